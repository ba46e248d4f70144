"""The recipes for containers name files that are there, and both make the same image."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "containers"


def docker_sources() -> set[str]:
    words = [line.split()[1:] for line in (RECIPES / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    return {source for *sources, _ in words for source in sources}


def apptainer_sections() -> dict[str, str]:
    text = (RECIPES / "apptainer.def").read_text()
    parts = re.split(r"^%(\w+).*\n", text, flags=re.MULTILINE)
    return {"header": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_what_is_copied_is_there_and_makes_the_package():
    pairs = [line.split() for line in apptainer_sections()["files"].splitlines() if line.strip()]
    assert all(target == f"/opt/aullm-dist/{source}" for source, target in pairs)
    sources = docker_sources()
    assert sources == {source for source, _ in pairs}
    assert all((ROOT / source).exists() for source in sources)
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        setup["project"]["readme"],
        *(Path(name).parts[0] for name in setup["project"]["license-files"]),
        "pyproject.toml",
    }
    folders = setup["tool"]["setuptools"]["package-dir"]
    for package in setup["tool"]["setuptools"]["packages"]:
        needed.add(Path(folders.get(package, package.replace(".", "/"))).parts[0])
    assert needed <= sources


def test_both_recipes_make_the_same_image():
    docker, apptainer = (RECIPES / "Dockerfile").read_text(), apptainer_sections()
    (image,) = re.findall(r"^FROM (\S+)$", docker, re.MULTILINE)
    assert f"From: {image}\n" in apptainer["header"]
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends (.+?) ?\\?$", docker, re.MULTILINE)
    assert f"--no-install-recommends {packages}\n" in apptainer["post"]
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", docker, re.MULTILINE)
    assert f"/opt/aullm-dist{extras}" in apptainer["post"]
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert extras.strip("[]") in setup["project"]["optional-dependencies"]
    assert 'exec aullm-dist "$@"' in apptainer["runscript"]
    assert 'ENTRYPOINT ["aullm-dist"]' in docker
    # Whoever is named by `docker run --user` has caches, and a name for the libraries that ask for one.
    assert re.search(r"^ENV .*HOME=/tmp USER=\w+$", docker, re.MULTILINE)
    low = tuple(map(int, setup["project"]["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, re.findall(r"python:(\d+)\.(\d+)", image)[0])) >= low
