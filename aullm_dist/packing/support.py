"""Decides which backbones and attentions run packed branches, and refuses everything else with the reason.

Prefix attention takes every architecture that passes the probe. The other attentions need a dense mask in the form that
the modelling file wants, which is known for the model types of `MASK_RECIPES` alone.
"""

from transformers import AutoModelForCausalLM, PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.packing.implementations import ATTENTIONS, LIBRARY_NAMES, has_sdpa
from aullm_dist.packing.masks import MASK_RECIPES, layer_windows
from aullm_dist.packing.probe import probe_packed, probe_padded

_REMEDY = "or set model.packing=false and model.attention=auto"


def check_packable(config: PretrainedConfig, attention: str) -> None:
    """Refuse a backbone or an attention implementation that is not proven to give what padded rows give.

    Raises:
        UserError: an attention that ignores custom masks or that the backbone does not have, a model type outside
            `MASK_RECIPES` with an attention that needs masks, settings for which no mask is known, or an architecture
            that fails the probe.
    """
    attention = next((ours for ours, theirs in LIBRARY_NAMES.items() if theirs == attention), attention)
    model_type = config.model_type
    if attention not in ATTENTIONS:
        why = " (flash attention ignores custom masks)" if "flash" in attention else ""
        allowed = ", ".join(ATTENTIONS)
        raise UserError(
            f"packing: attention {attention!r} cannot run packed branches{why}; allowed: {allowed}, {_REMEDY}"
        )
    if attention != "prefix" and model_type not in MASK_RECIPES:
        raise UserError(
            f"packing: model type {model_type!r} has no mask recipe for attention {attention!r}; "
            f"allowed: model.attention=prefix, {_REMEDY}"
        )
    if model_type in MASK_RECIPES:
        _check_recipe(config)
    if attention == "sdpa" and not has_sdpa(config):
        raise UserError(
            f"packing: {model_type} has no sdpa attention (soft-capped scores); allowed: prefix, eager, flex, {_REMEDY}"
        )
    if attention == "prefix":
        _check_probe(config)


def is_decoder(config: PretrainedConfig) -> bool:
    """Return whether the model of a config is a decoder, whatever its type says of itself.

    GPT-NeoX has `is_decoder: false` and is one; BERT's models have it as well, and look ahead.

    Args:
        config: of a causal LM that the library knows.
    """
    return getattr(config, "is_decoder", True) is not False or probe_padded(config).refusal is None


def check_padded(config: PretrainedConfig) -> None:
    """Refuse a backbone that cannot run on embeddings, row by row.

    Model code that ships with a checkpoint is not probed: it is not built before the user's files are read.

    Raises:
        UserError: the architecture fails the probe.
    """
    finding = probe_padded(config) if _is_known(config) else None
    if finding is not None and finding.refusal is not None and finding.proven:
        raise UserError(f"backbone of type {config.model_type}: {finding.refusal}; allowed: another backbone")


def _check_probe(config: PretrainedConfig) -> None:
    if not _is_known(config):
        raise UserError(
            f"packing: {config.model_type} is model code of its own, which cannot be probed; "
            "allowed: a model type that transformers knows, " + _REMEDY
        )
    if (refusal := probe_packed(config).refusal) is not None:
        would_work = "set model.packing=false and model.attention=auto"
        padded = probe_padded(config)
        if padded.refusal is not None and padded.proven:
            would_work = "allowed: another backbone, as it does not run padded either"
        raise UserError(f"packing: model type {config.model_type!r} {refusal}; {would_work}")


def _is_known(config: PretrainedConfig) -> bool:
    return type(config) in AutoModelForCausalLM._model_mapping


def _check_recipe(config: PretrainedConfig) -> None:
    """Refuse layers and settings under which the recipe of the model type would be wrong."""
    model_type = config.model_type
    known_types = set(layer_windows(config))
    if MASK_RECIPES[model_type] == "layer_types":
        known_types = {"full_attention", "sliding_attention"}
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - known_types)
    if other_layers:
        raise UserError(
            f"packing: {model_type} backbone has layers of type {', '.join(other_layers)}; "
            f"allowed: {', '.join(sorted(known_types))}, {_REMEDY}"
        )
    for name, wrong in _odd_settings(config).items():
        raise UserError(f"packing: {model_type} backbone has {name}={wrong}; no mask recipe for it, {_REMEDY}")


def _odd_settings(config: PretrainedConfig) -> dict[str, object]:
    """Return settings under which the recipe of the model type would be wrong."""
    odd = {name: getattr(config, name, None) for name in ("attention_chunk_size", "use_bidirectional_attention")}
    found = {name: given for name, given in odd.items() if given}
    if getattr(config, "is_causal", True) is False:
        found["is_causal"] = False
    window = layer_windows(config).get("sliding_attention", 1)
    if window is None or window < 1:
        found["sliding_window"] = window
    return found
