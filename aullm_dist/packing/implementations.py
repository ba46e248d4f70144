"""Lists attention implementations that run packed branches, by their names in transformers."""

from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig

from aullm_dist.packing import attention

ATTENTIONS = ("prefix", "sdpa", "eager", "flex")
"""Attention implementations that run packed branches: `prefix` knows the layout, `flex` takes it as a block mask, the
others take a dense mask."""

LIBRARY_NAMES = {"prefix": attention.NAME, "flex": "flex_attention"}
"""Names by which transformers knows attentions, where they differ from ours."""


def has_sdpa(config: PretrainedConfig) -> bool:
    """Return whether the library runs this causal LM with sdpa; one with soft-capped scores it does not."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    return type(config) in mapping and bool(mapping[type(config)]._supports_sdpa)
