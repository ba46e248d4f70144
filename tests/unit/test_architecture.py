"""Imports point one way, heavy libraries stay where they belong, and nothing shadows PyPI's `kernels`."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aullm_dist"
# A module may import only lower ranks; modules of one rank may import each other only inside their own package.
RANKS = {
    "post_import": -1,
    "": 0, "errors": 0, "files": 0, "log": 0, "facs": 0, "configs": 0,
    "config": 1, "endings": 1, "signals": 1, "slurm": 1,
    "data": 2, "model": 2,
    "planning": 3, "figures": 3,
    "training": 4,
    "evaluation": 5, "doctor": 5,
    "config_cli": 6, "release": 6, "report": 6,
    "cli": 7, "train_cli": 7,
    "train": 8,
}  # fmt: skip


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imports(path: Path) -> set[str]:
    """Every absolute module imported anywhere in a file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "aullm_dist"}
    return names


def test_imports_point_one_way():
    for module, path in _modules().items():
        room = _room(module)
        assert room in RANKS, f"{module}: give its room a rank"
        for name in _imports(path):
            if not name.startswith("aullm_dist"):
                continue
            other = _room(name)
            if other == room or other not in RANKS:
                continue
            allowed = RANKS[other] < RANKS[room] or other == ""
            assert allowed, f"{module} imports {name}, which is not below it"


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
    assert importers == {"aullm_dist.model.quantization"}


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
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "joblib", "dill"} & _imports(path), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}, path
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"Exception", "BaseException", "everything"}, (
                    f"{path}:{node.lineno} catches {caught}"
                )


def test_every_test_file_has_a_name_of_its_own():
    """Without packages in `tests`, two files of one name cannot be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
