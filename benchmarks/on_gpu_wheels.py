"""Make the folder of wheels that `on_gpu.py --wheels` takes: what a GPU machine with torch and transformers lacks.

    python benchmarks/on_gpu_wheels.py --out build/wheels [--python 3.12] [--cuda 13]

Needs the package index, and no GPU. deepspeed has no wheel there and is built here, without its CUDA extensions, which
no run of ours uses. Of bitsandbytes only the libraries of one CUDA version are kept, as all of them are 60 MB.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

BINARY = ("bitsandbytes", "pydantic_core")
"""Packages with compiled code, for the other machine's Python."""
PURE = (
    "datasets", "dill", "multiprocess", "openpyxl", "et_xmlfile", "pydantic", "annotated_types", "typing_inspection",
)  # fmt: skip
BUILT = ("deepspeed", "hjson")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> int:
    """Fetch and build the wheels; pip's exit code if it fails."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--python-version", options.python, "--implementation", "cp"]
    target += [f"--platform={name}" for name in PLATFORMS]
    fetched = [f"{name}=={version(name)}" for name in (*BINARY, *PURE)]
    built = [f"{name}=={version(name)}" for name in BUILT]
    with tempfile.TemporaryDirectory(prefix="aullm-wheels-") as folder:
        for command, variables in (
            ([*pip, "download", "--no-deps", "--only-binary=:all:", *target, "-d", folder, *fetched], {}),
            ([*pip, "wheel", "--no-deps", "-w", folder, *built], {"DS_BUILD_OPS": "0"}),
        ):
            done = subprocess.run(command, env=os.environ | variables, check=False)
            if done.returncode:
                return done.returncode
        for old in options.out.glob("*.whl"):
            old.unlink()
        for wheel in sorted(Path(folder).glob("*.whl")):
            copy(wheel, options.out / wheel.name, options.cuda)
    total = sum(path.stat().st_size for path in options.out.glob("*.whl"))
    print(f"{options.out}: {len(list(options.out.glob('*.whl')))} wheels, {total / 1e6:.0f} MB")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("build/wheels"), metavar="DIR", help="(build/wheels)")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="Python of the GPU machine (3.12)")
    parser.add_argument("--cuda", default="13", metavar="X[.Y]", help="CUDA of its torch (13)")
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python is {options.python}, allowed is a version such as 3.12")
    if not re.fullmatch(r"\d{2}(\.\d)?", options.cuda):
        parser.error(f"--cuda is {options.cuda}, allowed is a version such as 13 or 12.8")
    return options


def copy(wheel: Path, target: Path, cuda: str) -> None:
    """Copy a wheel without libraries for other versions of CUDA, and without those for other makers' GPUs."""
    wanted = f"libbitsandbytes_cuda{cuda.replace('.', '')}"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in source.infolist():
            name = Path(entry.filename).name
            other = name.startswith("libbitsandbytes_") and not name.startswith((wanted, "libbitsandbytes_cpu"))
            if not other:
                kept.writestr(entry, source.read(entry))


if __name__ == "__main__":
    sys.exit(main())
