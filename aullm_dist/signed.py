"""Writes and checks manifests: JSON files with a hash of their own bytes, which shows when they were altered."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.files import read_regular

__all__ = ["file_sha256", "json_bytes", "read_signed", "signed_bytes"]

_UNSIGNED = b"0" * 64
# The signature is the last entry, so a text inside the content can never be taken for it.
_SIGNATURE = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n\}\n\Z')


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """Return indented ASCII JSON with a final newline.

    Raises:
        ValueError: If `value` holds a number that JSON has no word for (NaN, infinity).
        TypeError: If `value` holds a type that JSON has no form for.
    """
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii")


def signed_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest as JSON, with a hash of its own bytes as the last entry."""
    unsigned = json_bytes({**manifest, "manifest_sha256": _UNSIGNED.decode()})
    signature = hashlib.sha256(unsigned).hexdigest().encode()
    place = _SIGNATURE.search(unsigned)
    assert place is not None, "the signature is the last entry"
    return unsigned[: place.start(1)] + signature + unsigned[place.end(1) :]


def read_signed(path: Path, format_name: str, format_version: int) -> dict[str, Any]:
    """Read what was written with `signed_bytes`, and check its hash of itself and its format.

    Raises:
        UserError: It cannot be read, is altered or truncated, or is of another or of a newer format.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    signature = _SIGNATURE.search(content)
    if signature is None:
        raise UserError(f"{path}: truncated or altered (it does not end with its own hash)")
    unsigned = content[: signature.start(1)] + _UNSIGNED + content[signature.end(1) :]
    if hashlib.sha256(unsigned).hexdigest().encode() != signature.group(1):
        raise UserError(f"{path}: altered (its own hash does not match)")
    manifest = json.loads(content)
    if manifest.get("format") != format_name:
        raise UserError(f"{path}: format is {manifest.get('format')!r}; allowed is {format_name!r}")
    if manifest["format_version"] > format_version:
        raise UserError(
            f"{path}: format_version is {manifest['format_version']}, written by a newer aullm-dist; "
            f"this one reads up to {format_version}"
        )
    return manifest
