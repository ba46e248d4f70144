"""aullm-dist: distributed training of AULLM++ for action unit detection in micro-expression clips."""

import importlib

__version__ = "0.1.0"

__all__ = ["Release", "__version__", "load"]

_LAZY = {"Release": "aullm_dist.release.loading", "load": "aullm_dist.release.loading"}


def __getattr__(name: str) -> object:
    # Every command imports this module, and most of them need no torch: what loads models comes when it is asked for.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
