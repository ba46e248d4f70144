"""Draws the rooms of the package on their floors, with the imports between them.

    python docs/tools/import_picture.py --out docs/pictures/imports.png [--root CHECKOUT]

Rooms are the folders of `aullm_dist` (its single files are one room, "ground" or "top"). A room stands above every room
that it imports; imports of the ground are left out. A wide box has many lines. Printed are files, lines, circles
between files, and imports that run upward, which can only be there where rooms import each other in a circle.
"""

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

TOP = {"cli", "train"}


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the package with its file."""
    found = {}
    for path in (root / "aullm_dist").rglob("*.py"):
        found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Return the modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def room_of(module: str, packages: set[str]) -> str:
    """Return the room of a module: its folder, or for single files the ground and the top of the house."""
    first = module.split(".")[1] if "." in module else ""
    if first in packages:
        return first
    return "top" if first in TOP or first.endswith("_cli") else "ground"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of nodes that reach each other (Tarjan's algorithm), without single nodes."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each room: one above the highest room that it imports; a circle shares a floor."""
    group = {node: node for node in graph}
    for circle in circles(graph):
        group |= dict.fromkeys(circle, circle[0])
    level: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in level:
            below = {group[other] for node in graph if group[node] == name for other in graph[node]} - {name}
            level[name] = 1 + max((height(other) for other in below), default=-1)
        return level[name]

    return {node: height(group[node]) for node in graph}


def draw(rooms: dict[str, tuple[int, int]], edges: Counter, level: dict[str, int], title: str, out: Path) -> None:
    """Draw boxes on floors and lines between them.

    Args:
        rooms: files and lines of each room.
        edges: imports from room to room.
        level: floor of each room.
        title: over the picture.
        out: PNG or SVG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [sorted(room for room in rooms if level[room] == floor) for floor in range(max(level.values()) + 1)]
    figure, axes = pyplot.subplots(figsize=(11, 1.05 * len(rows) + 0.8))
    place = {}
    for floor, row in enumerate(rows):
        for column, room in enumerate(row):
            place[room] = ((column + 0.5) / len(row) * 10, float(floor))
    for (room, other), count in edges.items():
        if other == "ground":
            continue  # nearly everybody imports errors and log; the lines would hide the others
        (x0, y0), (x1, y1) = place[room], place[other]
        upward = y1 >= y0
        look = {"color": "#d55e00", "alpha": 1.0} if upward else {"color": "#7a8699", "alpha": 0.45}
        look |= {"arrowstyle": "-|>", "linewidth": 0.5 + 0.12 * min(count, 20), "connectionstyle": "arc3,rad=0.06"}
        axes.annotate("", (x1, y1 + 0.2), (x0, y0 - 0.2), arrowprops=look)
    largest = max(lines for _, lines in rooms.values())
    for room, (x, y) in place.items():
        files, lines = rooms[room]
        width = 0.75 + 0.75 * (lines / largest) ** 0.5
        corner, look = (x - width / 2, y - 0.2), {"facecolor": "#e8eef7", "edgecolor": "#33415c"}
        axes.add_patch(pyplot.Rectangle(corner, width, 0.4, zorder=3, **look))
        axes.text(x, y + 0.05, room, ha="center", va="center", fontsize=9, weight="bold", zorder=4)
        axes.text(x, y - 0.11, f"{files} files, {lines} lines", ha="center", va="center", fontsize=6, zorder=4)
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    figure.savefig(out, dpi=120, bbox_inches="tight")


def main() -> None:
    """Draw one checkout and print its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="checkout to draw")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (.png or .svg)")
    parser.add_argument("--title", default="Imports of aullm_dist: a room imports from the floors below it")
    options = parser.parse_args()
    found = modules(options.root)
    packages = {path.parent.name for path in (options.root / "aullm_dist").glob("*/__init__.py")}
    graph = {module: imports(path, found.keys()) - {module} for module, path in found.items()}
    rooms: dict[str, tuple[int, int]] = {}
    edges: Counter = Counter()
    for module, path in found.items():
        room = room_of(module, packages)
        files, lines = rooms.get(room, (0, 0))
        named = path.name != "__init__.py"
        rooms[room] = (files + named, lines + len(path.read_text(encoding="utf-8").splitlines()))
        for other in graph[module]:
            # The package itself holds the version; who imports it imports nothing more.
            if other != "aullm_dist" and room_of(other, packages) != room and module != "aullm_dist":
                edges[room, room_of(other, packages)] += 1
    of_rooms = {room: {other for (one, other) in edges if one == room} for room in rooms}
    level = floors(of_rooms)
    upward = sum(count for (room, other), count in edges.items() if level[other] >= level[room])
    total = sum(lines for _, lines in rooms.values())
    name, (files, lines) = max(rooms.items(), key=lambda item: item[1][1])
    sys.stdout.write(
        f"{len(found)} modules, {total} lines in {len(rooms)} rooms; largest room {name}: {files} files, {lines} lines "
        f"({100 * lines / total:.0f} %)\ncircles between files: {len(circles(graph))}; imports upward: {upward}\n"
    )
    draw(rooms, edges, level, options.title, options.out)


if __name__ == "__main__":
    main()
