"""Predicts what a run would make of an LLM: packing, NF4, LoRA, memory and prompt, from its config alone.

Of a local folder, files that a run would refuse without reading a weight are refused as well, where they are there.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig

from aullm_dist.config import Config, load
from aullm_dist.data.corpora import get_drawable
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import with_setting
from aullm_dist.llm.base_check import check_files, check_tokenizer
from aullm_dist.llm.files import load_config, load_tokenizer, resolve
from aullm_dist.llm.lora import linear_layers, lora_targets_of
from aullm_dist.llm.pieces.skeleton import model_without_storage
from aullm_dist.llm.pieces.values import values_in_files
from aullm_dist.llm.pieces.walk import owners
from aullm_dist.llm.quantization import is_stored_in_nf4, method_of, nf4_config
from aullm_dist.llm.stored.wrappers import open_base, wrapper_type
from aullm_dist.llm.trial import idle_targets, refuse_without_nf4
from aullm_dist.model.prompt import build_prompt
from aullm_dist.packing.probe import probe_packed, probe_padded
from aullm_dist.packing.support import check_packable
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.packed_share import in_gb, share_in_nf4
from aullm_dist.planning.planner import plan
from aullm_dist.planning.report import gib

_CASES = ((1, "ddp"), (8, "zero3"))
"""GPUs and strategy of the runs whose memory is estimated."""
_SETTINGS = ("model.activation_checkpointing=non_reentrant", "training.micro_batch=1")
"""What takes little memory, unless the user says otherwise."""
_WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "adapter_config.json")
"""Files without which a folder holds no more than a config, and perhaps a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What each GPU of a run holds at most."""

    gpus: int
    strategy: str
    quantization: str
    packing: bool
    gpu_bytes: int | None
    """None where the run is refused or cannot be planned."""
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What is known of an LLM before its weights are read."""

    source: str
    model_type: str
    wrapper: str | None
    """Type of the multimodal model that it is inside of."""
    stored_as: str | None
    """How its files are quantised; None if they are not."""
    layers: int | None
    weights: int
    """Weights of the decoder, its vocabulary head left out."""
    packs: bool
    packing: str
    """What packing will do, and why."""
    weights_in_nf4: int
    bytes_in_nf4: int
    """With the constants of the blocks."""
    bytes_left_plain: int
    """Of all other weights, embeddings and norms among them."""
    weights_left_plain: int
    """Of linear layers and experts; embeddings and norms are never packed."""
    left_plain: str
    """Which those are, in words."""
    weights_in_experts: int
    """Of `weights_left_plain`, those that `nf4_experts` packs."""
    lora_layers: int
    lora_left_out: int
    lora_idle: int
    """Of `lora_layers`, those that no gradient reaches: they stay as they are."""
    lora_weights: int
    """Trained weights at the rank of `model.lora_rank`."""
    lora_rank: int
    prefix_tokens: int | None
    suffix_tokens: int | None
    memory: tuple[Memory, ...]
    refused: tuple[str, ...]


def check_backbone(name: str, overrides: list[str]) -> Checked:
    """Check an LLM by its config, its tokenizer and the headers of its files, as far as these are there.

    Args:
        name: local folder with config.json, or a Hugging Face name.
        overrides: settings of the run that it is checked for.

    Raises:
        UserError: there is no such model, it is no text decoder and none is inside it, or its files cannot be used.
    """
    config = load(None, [f"model.llm={name}", *_SETTINGS, *overrides])
    source, is_local = resolve(name)
    common = {"trust_remote_code": False, "local_files_only": is_local}
    llm = load_config(source, common)
    refused: list[str] = []
    with_weights = is_local and any(next(Path(source).glob(pattern), None) for pattern in _WEIGHTS)
    if with_weights:
        check_files(source, Path(source), llm)
    prompt = _prompt(config, llm, source, common)
    if with_weights:
        _check_weights(source, llm, refused)
    packs, packing = _packing(llm, refused)
    config = config.changed({"model.packing": packs})
    lora = _lora(llm, config, refused)
    share = share_in_nf4(llm)
    if not share.packed_weights:
        refused.append("model.quantization=nf4: has no linear layer that NF4 could quantise")
    try:
        refuse_without_nf4(llm)
    except UserError as error:
        refused.append(str(error))
    return Checked(
        source=source,
        model_type=llm.model_type,
        wrapper=wrapper_type(source),
        stored_as=method_of(llm),
        layers=getattr(llm, "num_hidden_layers", None),
        weights=_weights(llm),
        packs=packs,
        packing=packing,
        weights_in_nf4=share.packed_weights,
        bytes_in_nf4=share.packed_bytes,
        bytes_left_plain=share.plain_bytes,
        weights_left_plain=share.experts + share.others,
        left_plain=_left_plain(share.experts, share.others),
        weights_in_experts=share.experts,
        lora_layers=lora[0],
        lora_left_out=lora[1],
        lora_idle=lora[2],
        lora_weights=lora[3],
        lora_rank=config.model.lora_rank,
        prefix_tokens=prompt[0],
        suffix_tokens=prompt[1],
        memory=tuple(_memory(config, llm, prompt, *case) for case in _CASES) if lora[0] else (),
        refused=tuple(refused),
    )


def _check_weights(source: str, llm: PretrainedConfig, refused: list[str]) -> None:
    """Check the headers of an LLM's files against its config.

    Raises:
        UserError: they hold other weights than the config's model.
    """
    try:
        packed = is_stored_in_nf4(source, llm, "nf4")
    except UserError as error:
        refused.append(str(error))
        return
    files = open_base(source, llm)
    quantization = nf4_config(torch.bfloat16) if packed else None
    values_in_files(model_without_storage(llm, torch.bfloat16, quantization, files if packed else None), files, source)


def _packing(llm: PretrainedConfig, refused: list[str]) -> tuple[bool, str]:
    try:
        check_packable(llm, "prefix")
    except UserError as error:
        refused.append(str(with_setting(error, llm, "prefix", packing=True)))
        finding = probe_padded(llm)
        if finding.refusal is not None and finding.proven:
            refused.append(f"without packing: {finding.refusal}")
            return False, "cannot run on embeddings at all"
        return False, "refused; padded rows work (model.packing=false)"
    return True, f"on: at tiny size it equals padded rows within {probe_packed(llm).deviation:.0e}"


def _weights(llm: PretrainedConfig) -> int:
    model = model_without_storage(llm, torch.bfloat16, None)
    return sum(getattr(module, name).numel() for _, name, module in owners(model))


def _lora(llm: PretrainedConfig, config: Config, refused: list[str]) -> tuple[int, int, int, int]:
    """Return layers with LoRA, linear layers without, those with LoRA that no gradient reaches, and LoRA's weights."""
    model = model_without_storage(llm, torch.bfloat16, None)
    given = config.model.lora_targets
    wanted = given[0] if given == ("all-linear",) else given
    try:
        targets = lora_targets_of(model, wanted)
        idle = idle_targets(llm, targets, wanted, nf4=config.model.quantization != "none")
    except UserError as error:
        refused.append(str(error))
        return 0, 0, 0, 0
    modules: dict[str, Any] = dict(model.named_modules())
    sizes = [sum(modules[name].weight.shape) for name in targets]
    return len(targets), len(linear_layers(model)) - len(targets), len(idle), config.model.lora_rank * sum(sizes)


def _left_plain(experts: int, others: int) -> str:
    kinds = (
        (experts, "fused experts"),
        (others, "linear layers whose weights its code uses past the layer or that several share"),
    )
    return " and ".join(f"{_count(count)} in {what}" for count, what in kinds if count)


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} 10^9" if weights >= 1e8 else f"{weights / 1e6:.2f} 10^6"


def _prompt(config: Config, llm: PretrainedConfig, source: str, common: dict) -> tuple[int | None, int | None]:
    """Return prefix and suffix tokens of the prompt under the LLM's tokenizer; None where there is none."""
    is_local = common["local_files_only"]
    if is_local and not any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None, None
    tokenizer = load_tokenizer(source, common)
    check_tokenizer(source, tokenizer, llm)
    aus = tuple(config.data.aus) or get_drawable(config.data.synthetic_corpus, "data.synthetic_corpus").aus
    prompt = build_prompt(aus, tokenizer, readout=config.model.readout, use_structure=config.model.structure)
    return prompt.prefix_tokens, prompt.suffix_tokens


def _memory(
    config: Config, llm: PretrainedConfig, prompt: tuple[int | None, int | None], gpus: int, strategy: str
) -> Memory:
    quantization = "nf4" if method_of(llm) else config.model.quantization
    config = config.changed({"training.strategy": strategy, "model.quantization": quantization})
    say: Callable[..., Memory] = lambda **found: Memory(  # noqa: E731 - what the cases share
        gpus=gpus, strategy=strategy, quantization=quantization, packing=config.model.packing, **found
    )
    try:
        planned = plan(
            config, Cluster(gpus=gpus), llm=llm, speed=False, prefix_tokens=prompt[0], suffix_tokens=prompt[1]
        )
    except UserError as error:
        return say(gpu_bytes=None, problem=str(error))
    return say(gpu_bytes=planned.gpu_bytes, problem=None)


def as_dict(found: Checked) -> dict:
    """Return what was found as JSON values."""
    return dataclasses.asdict(found)


def print_checked(console: Console, found: Checked) -> None:
    """Print what was found for people."""
    inside = f" inside {found.wrapper}" if found.wrapper else ""
    console.print(Text(f"{found.source}: {found.model_type}{inside}", style="bold"))
    table = Table.grid(padding=(0, 2))
    rows = [("size", f"{_count(found.weights)} weights in {found.layers} layers, without the vocabulary head")]
    if found.stored_as:
        rows.append(("files", f"quantised by {found.stored_as}"))
    rows.append(("packing", found.packing))
    left = f"; {found.left_plain} stay in 16 bits" if found.left_plain else ""
    if found.weights_in_experts:
        left += ", experts in 4 bits as well with model.quantization=nf4_experts"
    in_bytes = f"{in_gb(found.bytes_in_nf4)} and {in_gb(found.bytes_left_plain)} that stay as they are"
    rows.append(("nf4", f"{_count(found.weights_in_nf4)} weights in 4 bits ({in_bytes}){left}"))
    without = f", {found.lora_left_out} others without" if found.lora_left_out else ""
    lora = f"{_count(found.lora_weights)} weights at rank {found.lora_rank} on {found.lora_layers} linear layers"
    idle = f"; {found.lora_idle} of them get no gradient and stay as they are" if found.lora_idle else ""
    rows.append(("lora", lora + without + idle))
    if found.prefix_tokens is None:
        rows.append(("prompt", "no tokenizer at hand"))
    else:
        rows.append(("prompt", f"{found.prefix_tokens} tokens that all branches share, {found.suffix_tokens} of each"))
    for case in found.memory:
        what = f"{case.gpus} GPU{'s' * (case.gpus > 1)}, {case.strategy}, {case.quantization}"
        rows.append(("memory", f"{what}: " + (case.problem or f"{gib(case.gpu_bytes or 0)} of each GPU")))
    rows += [("refused", line) for line in found.refused]
    for row in rows:
        table.add_row(*row)
    console.print(table)
