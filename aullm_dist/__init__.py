"""Trains AULLM++ on several GPUs: action unit detection in micro-expression clips with LLMs (aullm-dist)."""

import importlib

from aullm_dist.post_import import when_imported

__version__ = "0.1.0"

__all__ = ["Release", "__version__", "load"]

# Releases load by `AutoConfig` and `AutoModel`. Registering them here and now would import transformers and torch,
# seconds that every `--help` would take; so it is done when somebody imports the tables that they are registered in.
_AUTO = "aullm_dist.release.auto"
when_imported(
    "transformers.models.auto.configuration_auto", lambda module: importlib.import_module(_AUTO).register_config(module)
)
when_imported(
    "transformers.models.auto.modeling_auto", lambda module: importlib.import_module(_AUTO).register_model(module)
)

_LAZY = {"Release": "aullm_dist.release.loading", "load": "aullm_dist.release.loading"}


def __getattr__(name: str) -> object:
    # Every command imports this module, and most of them need no torch: what loads models comes when it is asked for.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
