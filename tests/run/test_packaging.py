"""What users install: the package list, the declared and pinned dependencies, and a wheel that works on its own."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import aullm_dist

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Distribution -> the name it is imported by, where the two differ.
IMPORT_NAMES = {
    "nvidia-ml-py": "pynvml",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
# Tools that nothing imports: distribution -> the file that uses it, and a text of that use.
TOOLS = {
    "mypy": ("Makefile", "$(BIN)/mypy"),
    **{f"types-{name}": ("pyproject.toml", "[tool.mypy]") for name in ("pyyaml", "openpyxl", "psutil", "tqdm")},
    "build": ("tests/run/test_packaging.py", '"-m", "build"'),
    "pytest-timeout": ("pyproject.toml", "timeout = "),
    "pytest-xdist": ("Makefile", "--numprocesses"),
    "ruff": ("Makefile", "ruff check"),
    "setuptools": ("pyproject.toml", 'build-backend = "setuptools.build_meta"'),
    "triton": ("kernels/aullm_kernels/dispatch.py", '"triton"'),
}
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")


def _names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in requirements}


CORE = _names(PROJECT["project"]["dependencies"])
EXTRAS = {name: _names(lines) for name, lines in PROJECT["project"]["optional-dependencies"].items()}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(version for _, _, version in pins), "a line of constraints.txt is no `name==version`"
    return {name.lower().replace("_", "-"): version for name, _, version in pins}


def _third_party_imports(*folders: str) -> dict[str, str]:
    """Return each imported top-level name that is neither ours nor Python's, with one file that imports it."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    folders_beside = ("tests", "benchmarks", "kernels/benchmarks")
    beside = [
        name
        for folder in folders_beside
        for path in (ROOT / folder).rglob("*.py")
        for name in (path.stem, path.parent.name)
    ]
    ours = {"aullm_dist", "aullm_kernels", *beside}
    found = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for name in {module.partition(".")[0] for module in modules} - ours - set(sys.stdlib_module_names):
                found[name] = str(path.relative_to(ROOT))
    return found


def _import_names(distributions: set[str]) -> set[str]:
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in distributions}


def test_the_package_list_is_the_tree():
    """It is written by hand, so that a forgotten folder would only show in an installed wheel."""
    expected = set()
    for folder in (ROOT / "aullm_dist", ROOT / "kernels" / "aullm_kernels"):
        packages = [path.parent.relative_to(folder.parent) for path in folder.rglob("__init__.py")]
        expected |= {".".join(path.parts) for path in packages}
    config_files = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    for path in config_files:
        expected.add(".".join(("aullm_dist", *path.parent.relative_to(ROOT).parts)))
    tool = PROJECT["tool"]["setuptools"]
    assert set(tool["packages"]) == expected
    assert len(tool["packages"]) == len(expected)
    for path in config_files:
        package = ".".join(("aullm_dist", *path.parent.relative_to(ROOT).parts))
        assert any(path.match(pattern) for pattern in tool["package-data"][package]), path
    for path in (ROOT / "aullm_dist").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(pattern) for pattern in tool["package-data"].get(package, ())), path


def test_every_dependency_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    count = 0
    for requirement in [
        *PROJECT["project"]["dependencies"],
        *(line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines),
    ]:
        lines = [line for line in text.splitlines() if line.strip().startswith(f'"{requirement}",')]
        assert lines
        assert all(len(line.partition("#")[2].split()) >= 2 for line in lines), lines
        count += 1
    assert count > 10


def test_every_dependency_is_used():
    imported = _third_party_imports("aullm_dist", "kernels", "benchmarks", "tests")
    for name in CORE.union(*EXTRAS.values()):
        if name in TOOLS:
            file, use = TOOLS[name]
            assert use in (ROOT / file).read_text(encoding="utf-8"), f"{name} is no longer used by {file}"
        else:
            # torch itself imports tensorboard behind torch.utils.tensorboard.
            assert IMPORT_NAMES.get(name, name.replace("-", "_")) in imported, f"{name} is declared but never imported"


def test_every_import_is_declared():
    """What is installed only because something else needs it may vanish with that."""
    package = _third_party_imports("aullm_dist", "kernels/aullm_kernels")
    undeclared = package.keys() - _import_names(CORE | EXTRAS["cuda"] | EXTRAS["gguf"])
    assert not undeclared, {name: package[name] for name in undeclared}
    around = _third_party_imports("tests", "benchmarks", "kernels/benchmarks")
    undeclared = around.keys() - _import_names(CORE | EXTRAS["dev"] | EXTRAS["bench"])
    assert not undeclared, {name: around[name] for name in undeclared}


def test_constraints_pin_every_dependency_of_a_cpu_machine():
    pins = _pins()
    assert not (CORE | EXTRAS["dev"]) - pins.keys()
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if name.startswith("nvidia")]
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"(?m)^\s*-", text), "an option such as --index-url chooses the registry for the user"


def test_the_version_is_written_the_same_twice():
    assert PROJECT["project"]["version"] == aullm_dist.__version__


def test_make_and_the_readme_name_the_commands():
    targets = set(re.findall(r"(?m)^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert {"setup", "demo", "test", "check", "bench"} <= targets
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"accelerate launch( --\S+| \d+)* aullm_dist/train\.py", readme)
    ours = ("prepare", "synthesize", "config", "evaluate", "checkpoint verify")
    missing = [
        name for name in ("make demo", "make test", *(f"aullm-dist {name}" for name in ours)) if name not in readme
    ]
    assert not missing


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        (["CUDA=0"], "-c constraints.txt -e .[dev]"),
        (["CUDA=1"], "-e .[cuda,dev]"),
        (["CUDA=0", "TORCH_INDEX=file:///index"], "--extra-index-url file:///index -c constraints.txt -e .[dev]"),
    ],
)
def test_make_setup_installs_for_the_machine_that_it_is_told(variables, arguments, tmp_path):
    """A login node has no GPU, and installs for nodes that have one."""
    command = ["make", "--dry-run", "setup", f"VENV={tmp_path / 'venv'}", *variables]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"pip install {arguments}  (log:" in told
    assert re.sub(r" +", " ", told).count(f"pip install {arguments} ") == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: `build/` and `*.egg-info` are left where the build runs."""
    source = tmp_path_factory.mktemp("source") / "aullm-dist"
    source.mkdir()
    for name in ("aullm_dist", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=NOT_SOURCES)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation the build takes the installed setuptools and needs no network.
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an otherwise empty environment with the wheel, and PyYAML for the run files."""
    environment = tmp_path_factory.mktemp("empty") / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", str(environment)], environment.parent)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--no-index"]
    _run([*pip, "--no-deps", str(wheel)], environment.parent)
    # PyYAML comes from this environment, because a test may not download.
    library = tmp_path_factory.mktemp("library")
    shutil.copytree(Path(yaml.__file__).parent, library / "yaml", ignore=NOT_SOURCES)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "library.pth").write_text(f"{library}\n", encoding="utf-8")
    return environment / "bin"


def _run(command: list[str], folder: Path) -> str:
    """Run in `folder` without what ties Python to this checkout, and return stdout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_an_empty_environment_runs_the_command(installed, tmp_path):
    text = _run([str(installed / "aullm-dist"), "--help"], tmp_path)
    for command in ("prepare", "synthesize", "config", "evaluate", "checkpoint"):
        assert re.search(rf"(?m)^ +{command}\s", text), command
    assert _run([str(installed / "aullm-dist"), "--version"], tmp_path).split() == [
        "aullm-dist",
        aullm_dist.__version__,
    ]
    assert not list(tmp_path.iterdir())


def test_an_empty_environment_finds_every_shipped_run_file(installed, tmp_path):
    found = _run(
        [str(installed / "python"), "-c", "from aullm_dist import config; print(config.configs_folder())"], tmp_path
    )
    assert Path(found.strip()).is_relative_to(installed.parent)
    root = ROOT / "configs" / "experiments"
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    assert {"demo", "ablation/ccr"} < set(names)
    for name in names:
        resolved = yaml.safe_load(_run([str(installed / "aullm-dist"), "config", name], tmp_path))
        written = yaml.safe_load((ROOT / "configs" / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
        for group, values in written.items():
            assert {key: resolved[group][key] for key in values} == values, (name, group)


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "aullm-dist"
    for field in ("Summary", "Keywords", "License-Expression", "Requires-Python", "Author", "Project-URL"):
        assert metadata[field], field
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    # Nobody who only uses it gets the tools of its developers.
    needed = {
        re.match(r"[\w.-]+", line)[0].lower() for line in metadata.get_all("Requires-Dist") if "extra ==" not in line
    }
    assert needed == CORE
    assert not needed & {"triton", "pytest", "mypy", "ruff"}


def test_the_wheel_holds_the_packages_and_nothing_else(installed):
    (site_packages,) = installed.parent.glob("lib/python*/site-packages")
    top = {path.name for path in site_packages.iterdir() if path.name not in ("library.pth", "__pycache__")}
    assert top == {"aullm_dist", "aullm_kernels", f"aullm_dist-{aullm_dist.__version__}.dist-info"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "aullm_dist").rglob("*.py")}
    assert sources == {path.relative_to(site_packages) for path in (site_packages / "aullm_dist").rglob("*.py")}
    others = {path for path in (ROOT / "aullm_dist").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    data = {path.relative_to(ROOT) for path in others}
    data |= {Path("aullm_dist", path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.*")}
    assert {path.suffix for path in data} >= {".css", ".jinja", ".js", ".json", ".safetensors", ".typed", ".yaml"}
    assert sorted(str(path) for path in data if not (site_packages / path).is_file()) == []
