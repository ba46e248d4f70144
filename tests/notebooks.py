"""Runs a notebook's cells in order, without Jupyter: its kernel and server are 30 packages that nothing else needs.

Code cells are Python in one namespace, or lines `!command`, as a notebook of this project may have them. `{name}` in a
command is a variable of the notebook. Commands of `aullm-dist` run in forked processes, which saves their imports.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from training_runs import TRAIN, fork


def code_cells(path: Path) -> list[str]:
    """Return the source of the code cells of a notebook of format 4."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(path: Path) -> dict[str, Any]:
    """Run a notebook in the current folder and return its variables; a command or a cell that fails is an error."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(path)):
        if source.startswith("!"):
            for line in source.splitlines():
                names.setdefault("outputs", []).append(_command(line.removeprefix("!"), names))
        else:
            assert not re.search(r"^[%!]", source, re.MULTILINE), f"cell {number}: Python and commands in one cell"
            exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
    return names


def _command(line: str, names: dict[str, Any]) -> str:
    filled = re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), line)
    program, *words = shlex.split(filled)
    assert program == "aullm-dist", f"{line}: notebooks use aullm-dist alone"
    if words[0] == "train":
        # What `aullm-dist train` becomes in one process.
        result = fork("--config", *words[1:], program=TRAIN)
    else:
        result = fork(*words, program="aullm_dist.cli")
    assert result.returncode == 0, f"{line}\n{result.stderr}"
    return result.stdout
