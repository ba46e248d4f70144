"""Registers AutoConfig and AutoModel for release folders: `AutoModel.from_pretrained(DIR)` after `import aullm_dist`.

`aullm_dist.post_import` calls the two functions at the end as soon as transformers' own tables exist. transformers is
then still importing itself, whoever began it, so nothing is taken here from it but its config class, nor from us.
"""

import importlib
from types import ModuleType
from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class AULLMConfig(PreTrainedConfig):
    """config.json of a release; its keys are described in docs/release.md."""

    model_type = "aullm"


class AutoEntry:
    """Registered with AutoModel; it stands for `release.network.AULLMModel`, which needs all of transformers."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load a release folder as `AULLMModel.from_pretrained` does."""
        network = importlib.import_module("aullm_dist.release.network")
        return network.AULLMModel.from_pretrained(*arguments, **options)


def register_config(module: ModuleType) -> None:
    """Enter the config into `module`, transformers.models.auto.configuration_auto."""
    module.AutoConfig.register(AULLMConfig.model_type, AULLMConfig, exist_ok=True)


def register_model(module: ModuleType) -> None:
    """Enter the model into `module`, transformers.models.auto.modeling_auto."""
    module.AutoModel.register(AULLMConfig, AutoEntry, exist_ok=True)
