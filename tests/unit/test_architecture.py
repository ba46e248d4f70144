"""Imports point one way, heavy libraries stay where they belong, and nothing shadows PyPI's `kernels`."""

import ast
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aullm_dist"
# Floors, lowest first. A module imports from lower floors, and on its own floor from its own room only.
FLOORS = """
    post_import
    errors log facs versions quiet shell configs
    files wording library_errors
    signed
    config
    packing
    data llm runtime figures
    model
    distributed runs planning doctor
    checkpoint evaluation
    monitoring
    training
    release merge
    prediction
    report app
    commands
    cli
    train
"""
RANKS = {room: floor for floor, rooms in enumerate(FLOORS.split("\n")) for room in rooms.split()}


MOST_PARAMETERS = 8
# Functions of another library's signature: attention of transformers, and what repeats the signatures of the operators
# that torch's library, autograd and Triton fix.
FIXED_SIGNATURES = ("aullm_dist/packing/attention.py", "kernels/aullm_kernels/")


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@functools.cache
def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """Every absolute module imported anywhere in a file, inside functions too."""
    names = set()
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            # `from room import module` names the module; names that are none match nothing.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def test_imports_point_one_way():
    for module, path in _modules().items():
        room = _room(module)
        if not room:
            continue  # the package itself: its version, and what is loaded lazily
        assert room in RANKS, f"{module}: give its room a floor"
        for name in _imports(path):
            if not name.startswith("aullm_dist."):
                continue
            other = _room(name)
            if other == room or other not in RANKS:
                continue
            assert RANKS[other] < RANKS[room], f"{module} imports {name}, which is not below it"


def test_no_file_imports_itself_by_way_of_others():
    """Circles inside a room count as well, and so do imports inside functions."""
    modules = _modules()
    imported = {module: (_imports(path) & modules.keys()) - {module} for module, path in modules.items()}
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "circle: " + " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for other in sorted(imported[module]):
            follow(other, (*way, module))
        done.add(module)

    for module in sorted(modules):
        follow(module, ())


def test_rooms_are_neither_crowded_nor_empty():
    rooms: dict[Path, list[str]] = {}
    for path in _modules().values():
        if path.parent != PACKAGE and path.name != "__init__.py":
            rooms.setdefault(path.parent, []).append(path.name)
    for room, files in rooms.items():
        # `commands` has a file for each command, `corpora` one for each corpus.
        assert len(files) <= (25 if room.name in ("commands", "corpora") else 16), f"{room}: {len(files)} files"
        assert len(files) >= 3, f"{room}: only {files}"


def test_only_the_model_knows_the_kernels():
    for module, path in _modules().items():
        if any(name.split(".")[0] == "aullm_kernels" for name in _imports(path)):
            assert _room(module) == "model", f"{module} imports aullm_kernels"


def test_only_one_module_imports_bitsandbytes():
    """Its remedies live there; a second door would let a model through without them."""
    importers = {
        module
        for module, path in _modules().items()
        if any(name.split(".")[0] == "bitsandbytes" for name in _imports(path))
    }
    assert importers == {"aullm_dist.llm.quantization"}


def test_the_kernels_know_nothing_of_us():
    for path in (ROOT / "kernels" / "aullm_kernels").glob("*.py"):
        allowed = {"torch", "triton", "aullm_kernels", *sys.stdlib_module_names}
        assert {name.split(".")[0] for name in _imports(path)} <= allowed, path


def test_pypi_kernels_is_not_shadowed():
    """transformers imports the package `kernels` where it is installed; ours is a folder and must stay one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin


def test_the_command_line_answers_without_heavy_libraries():
    code = (
        "import sys; from aullm_dist.cli import build_parser; build_parser(); "
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'peft', 'PIL', 'openpyxl', 'numpy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle_and_no_blanket_excuses():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not {"pickle", "joblib", "dill"} & _imports(path), path
        for node in _nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}, path
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"Exception", "BaseException", "everything"}, (
                    f"{path}:{node.lineno} catches {caught}"
                )


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    others = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(names) - (names[:1] in (["self"], ["cls"])) + others


def test_what_belongs_together_is_handed_over_together():
    """More parameters than these are a clump that wants an object."""
    clumps = set()
    for path in (path for top in ("aullm_dist", "benchmarks", "kernels") for path in (ROOT / top).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(FIXED_SIGNATURES):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _parameters(node) > MOST_PARAMETERS:
                clumps.add(f"{name}: {node.name}")
    assert sorted(clumps) == []


def test_packages_tell_checkers_that_they_have_types():
    assert (PACKAGE / "py.typed").is_file()
    assert (ROOT / "kernels" / "aullm_kernels" / "py.typed").is_file()


def test_every_test_file_has_a_name_of_its_own():
    """Without packages in `tests`, two files of one name cannot be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_only_one_module_names_the_files_of_a_run():
    files = {"folds.json", "config.yaml", "environment.json", "stratification.json", "thresholds.json", "fold-*"}
    for module, path in _modules().items():
        if module == "aullm_dist.runs.paths":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                assert node.value not in files, f"{path}:{node.lineno} writes the name {node.value}"
            if isinstance(node, ast.JoinedStr):
                starts = [part.value for part, after in zip(node.values, node.values[1:], strict=False)
                          if isinstance(part, ast.Constant) and isinstance(after, ast.FormattedValue)]  # fmt: skip
                assert not any(start.endswith("fold-") for start in starts), f"{path}:{node.lineno} names a fold"


def test_the_map_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(room for room in rooms if f"`{room}/`" not in text) == []


def test_git_ignores_no_module():
    """A pattern for outputs, such as `runs/`, once hid a room of that name."""
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked source tree has no git to ask")
    files = [str(path.relative_to(ROOT)) for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]]
    found = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", *files], capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == []
