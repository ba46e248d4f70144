"""Checks a base before anything of it is loaded: the same refusals for every command that reads one.

The library takes more than safetensors files of the weights: an adapter next to them, pickles, weights under a name
that the config gives. What reads a base in pieces, quantises it, merges into it or fingerprints it takes safetensors
files alone. So whatever would make one command see another function than the next, or none, is refused here.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.llm.files import TRIAL_TEXT, load_tokenizer
from aullm_dist.llm.stored.weight_files import WeightFiles, weight_files

_CONVERSION = (
    "convert it once, in Python: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), and copy the "
    "tokenizer's files"
)
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = "adapter_config.json"
# What the library takes for a checkpoint of its own sharded format, in the place of model.safetensors.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def check_base(source: str, folder: Path, config: PretrainedConfig, common: dict | None = None) -> Any:
    """Check a base whose config was read, and return its tokenizer.

    Args:
        source: the base's name or folder, as the library is given it.
        folder: where its files are.
        config: its config.
        common: options of the library's `from_pretrained`; None reads local files alone.

    Raises:
        UserError: what `check_files` and `check_tokenizer` refuse, or a tokenizer that cannot be read.
    """
    check_files(source, folder, config)
    tokenizer = load_tokenizer(source, common or {"trust_remote_code": False, "local_files_only": True})
    check_tokenizer(source, tokenizer, config)
    return tokenizer


def check_files(source: str, folder: Path, config: PretrainedConfig) -> None:
    """Refuse files whose weights not every command would read alike; headers are read, weights are not.

    Args:
        source: the base's name, for messages.
        folder: where its files are.
        config: its config.

    Raises:
        UserError: an adapter next to the weights, weights in pickles or under other names, files that are missing,
            damaged or cut, fewer tensors than layers.
    """
    if (folder / _ADAPTER).is_file():
        raise UserError(
            f"backbone {source}: {_ADAPTER} makes the library put an adapter on the weights; move the adapter's files "
            "out of the folder to train on the weights alone, or merge the adapter into them"
        )
    other = getattr(config, "transformers_weights", None)
    if other is not None:
        raise UserError(
            f"backbone {source}: config.json: transformers_weights names {other!r} as the file of the weights; "
            "allowed: model.safetensors, or files that model.safetensors.index.json names, without that key"
        )
    distributed = next((path.name for path in sorted(folder.iterdir()) if _DISTRIBUTED.match(path.name)), None)
    if distributed is not None:
        raise UserError(f"backbone {source}: {distributed} is a piece of a distributed checkpoint; {_CONVERSION}")
    if not any(path.is_file() for path in weight_files(folder)):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"backbone {source}: holds its weights in {pickles[0]} alone, a pickle; allowed: safetensors files; "
                f"{_CONVERSION}"
            )
    files = WeightFiles(folder)
    files.close()
    layers = getattr(config, "num_hidden_layers", 0) or 0
    if isinstance(layers, int) and layers > len(files.tensors):
        raise UserError(
            f"backbone {source}: config.json: num_hidden_layers is {layers}, and its files hold {len(files.tensors)} "
            "tensors; allowed: files that hold every weight of config.json's model"
        )


def check_tokenizer(source: str, tokenizer: Any, config: PretrainedConfig) -> None:
    """Refuse a tokenizer whose ids have no row among the embeddings, or that has none for the words of the prompt.

    Added tokens beyond the embeddings are let pass unless a prompt has them: published models have such tokens.

    Args:
        source: the base's name, for messages.
        tokenizer: its tokenizer.
        config: its config.

    Raises:
        UserError: naming the id and the number of rows.
    """
    rows = getattr(config, "vocab_size", None)
    ids, words = list(tokenizer(TRIAL_TEXT).input_ids), len(TRIAL_TEXT.split())
    if len(ids) < words // 2:
        raise UserError(
            f"backbone {source}: its tokenizer has {len(ids)} ids for the {words} words of the prompt; "
            "allowed: the tokenizer that was published with the weights"
        )
    if not isinstance(rows, int):
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = tokenizer.get_vocab() if backend is None else backend.get_vocab(with_added_tokens=False)
    for which, largest in (("gives the prompt the id", max(ids)), ("has the id", max(known.values(), default=0))):
        if largest >= rows:
            raise UserError(
                f"backbone {source}: its tokenizer {which} {largest}, and its embeddings have {rows} rows "
                "(vocab_size); allowed: the tokenizer that was published with the weights"
            )


@torch.no_grad()
def is_finite(values: Tensor) -> bool:
    """Return whether no value is infinite or not a number, without a copy of them."""
    return not values.numel() or not values.is_floating_point() or bool(torch.stack(values.aminmax()).isfinite().all())


def holds_finite(parameter: nn.Parameter, first: int = 0, last: int | None = None) -> bool:
    """Return whether the weights of a parameter are finite numbers.

    Args:
        parameter: plain, or packed in NF4: that has one offset over the constants of all its blocks, in which every
            constant counts.
        first: of the plain weights that are looked at, which are flat.
        last: not included; None means to the end.
    """
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return is_finite(state.offset.reshape(-1) if state.nested else state.absmax)
    return is_finite(parameter.detach().reshape(-1)[first:last])


def refuse_not_finite(source: str, names: Iterable[str]) -> None:
    """Refuse a base some of whose weights are not finite.

    Args:
        source: the base's name, for messages.
        names: of these weights.

    Raises:
        UserError: there is one; the first is named.
    """
    first = next(iter(names), None)
    if first is not None:
        raise UserError(
            f"backbone {source}: {first} holds values that are infinite or not a number; allowed: finite weights, "
            "complete as published"
        )
