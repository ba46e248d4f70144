"""Collects the versions of libraries that shape a run, for its records."""

import platform
from importlib import metadata

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "bitsandbytes", "deepspeed")


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the installed libraries that shape a run."""
    versions = {"python": platform.python_version()}
    for name in ("aullm-dist", *_LIBRARIES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
