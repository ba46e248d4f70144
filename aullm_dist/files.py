"""Writing small files so that a reader never sees half of one."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it into place; the folder is made if it is missing.

    Raises:
        OSError: If the folder cannot be written; `path` then keeps what it held before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
