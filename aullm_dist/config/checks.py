"""Checks of a configuration beyond types: ranges, and combinations that cannot work."""

import math
from collections.abc import Callable

from aullm_dist.config.schema import Config
from aullm_dist.errors import UserError

_POSITIVE = (
    "model.suffix_multiple model.llm_hidden model.llm_layers model.lora_alpha model.evidence_heads model.graph_width "
    "model.graph_heads model.graph_layers data.shuffle_buffer "
    "data.synthetic_clips data.synthetic_amplitude training.epochs "
    "training.global_batch training.micro_batch training.lr_lora training.lr_new training.lr_led training.clip_norm "
    "training.max_bad_steps training.evaluate_every_epochs training.keep_checkpoints training.grace_seconds "
    "monitor.log_every_steps"
).split()
_POSITIVE_OR_NULL = (
    "data.synthetic_frames training.max_steps training.processes training.cpu_threads training.save_every_steps".split()
)
_NOT_NEGATIVE = (
    "model.suffixes_per_row data.workers counterfactual.branches "
    "counterfactual.structure_weight counterfactual.appearance_weight counterfactual.neutral_weight "
    "counterfactual.contradiction_weight training.weight_decay "
    "training.graph_weight training.max_failures "
    "monitor.communication_every_steps monitor.clips monitor.projector_clips"
).split()
_SEEDS = ["training.seed", "data.synthetic_seed"]
_GAMMAS = ["training.asl_gamma_negative", "training.asl_gamma_positive"]
_SHARES = (
    "model.lora_dropout model.dropout data.inner_fraction data.cut_fraction data.synthetic_balance "
    "counterfactual.structure_probability counterfactual.structure_edges counterfactual.appearance_probability "
    "counterfactual.neutral_probability counterfactual.contradiction_margin "
    "training.warmup_fraction training.min_lr_fraction training.asl_margin"
).split()


def check(config: Config) -> None:
    """Refuse values and combinations that cannot work.

    Raises:
        UserError: one line with the key, what it is and what is allowed.
    """
    _require(config, _POSITIVE, lambda v: 0 < v < math.inf, "a finite number above 0")
    _require(config, _POSITIVE_OR_NULL, lambda v: v is None or v > 0, "a number above 0, or null")
    _require(config, _NOT_NEGATIVE, lambda v: 0 <= v < math.inf, "a finite number, 0 or more")
    _require(config, _SEEDS, lambda v: 0 <= v < 2**32, "0 to 4294967295")
    _require(config, _GAMMAS, lambda v: v == 0 or 1 <= v < math.inf, "0, or a finite number from 1 (finite gradients)")
    _require(config, ["training.asl_margin"], lambda v: v <= 0.5, "a share between 0 and 0.5")
    _require(config, _SHARES, lambda v: 0 <= v <= 1, "a share between 0 and 1")
    _require(config, ["model.lora_dropout", "model.dropout"], lambda v: v < 1, "a share below 1")
    _require(config, ["data.inner_fraction"], lambda v: v <= 0.5, "a share between 0 and 0.5")
    _require(config, ["data.cut_fraction"], lambda v: v <= 0.4, "a share between 0 and 0.4")
    lora_alone = (
        "1 or more: the LLM is trained through LoRA alone, full fine-tuning is not offered and NF4 cannot take it"
    )
    _require(config, ["model.lora_rank"], lambda v: v >= 1, lora_alone)
    _require(config, ["data.num_frames"], lambda v: v >= 4, "4 or more, as the visual backbone needs them")
    _require(config, ["data.folds", "data.synthetic_subjects"], lambda v: v >= 2, "2 or more")
    _require(config, ["data.size"], lambda v: 32 <= v <= 512, "a side of 32 to 512 pixels")
    _require(config, ["data.fold"], lambda v: v is None or v >= 0, "a fold number from 0, or null for all folds")
    _check_model(config)
    _check_data(config)
    _check_counterfactual(config)
    _check_batch(config)
    if not config.training.output.strip():
        raise UserError("training.output is empty; give the run a folder, such as runs/first")


def _get(config: Config, name: str) -> object:
    group, key = name.split(".")
    return getattr(getattr(config, group), key)


def _require(config: Config, names: list[str], accepts: Callable[..., bool], allowed: str) -> None:
    for name in names:
        value = _get(config, name)
        # NaN fails every comparison, so it is refused here as well.
        if not accepts(value):
            raise UserError(f"{name} is {value!r}; allowed: {allowed}")


def _check_model(config: Config) -> None:
    model = config.model
    if model.llm_hidden % 32:
        raise UserError(f"model.llm_hidden is {model.llm_hidden}; allowed: a multiple of 32")
    if not model.structure and model.training_statistics:
        raise UserError("model.training_statistics needs model.structure: true; there is no graph to start")
    if model.llm == "none" and model.readout != "last":
        raise UserError("model.readout is 'per_au' with model.llm: none; allowed: last, as there are no tokens to read")
    if model.architecture is not None and model.llm in ("tiny", "none"):
        raise UserError(
            f"model.architecture is given with model.llm: {model.llm}; allowed: null, or a Hugging Face name or "
            "folder in model.llm (the tiny backbone is described by model.llm_architecture, llm_hidden and llm_layers)"
        )
    if model.llm == "none" and model.quantization != "none":
        raise UserError(f"model.quantization is {model.quantization!r} with model.llm: none; allowed: none, or an LLM")
    if model.llm == "none" and model.compile != "none":
        raise UserError(f"model.compile is {model.compile!r} with model.llm: none; allowed: none, or an LLM")
    if model.suffixes_per_row % model.suffix_multiple:
        raise UserError(
            f"model.suffixes_per_row is {model.suffixes_per_row}; allowed: a multiple of model.suffix_multiple = "
            f"{model.suffix_multiple}, or 0"
        )
    if model.suffix_multiple > 1 and not model.packing:
        raise UserError(
            f"model.suffix_multiple is {model.suffix_multiple} with model.packing: false; allowed: 1, as padded rows "
            "are all of one length"
        )
    if not model.lora_targets:
        raise UserError("model.lora_targets is empty; allowed: [all-linear] or names of linear layers such as [q_proj]")


def _check_data(config: Config) -> None:
    data = config.data
    if len(set(data.aus)) != len(data.aus):
        raise UserError(f"data.aus is {data.aus}; allowed: each AU once")
    if data.protocol in ("lodo", "composite") and data.folds_file is None and len(data.train) < 2:
        raise UserError(
            f"data.protocol is {data.protocol!r}; data.train must name prepared datasets of 2 or more corpora"
        )
    if data.folds_file is not None:
        if not data.train or data.test:
            raise UserError("data.folds_file needs data.train with every dataset it names, and no data.test")
        return
    if data.protocol == "cross" and not (data.train and data.test):
        raise UserError("data.protocol is 'cross'; data.train and data.test must each name a prepared dataset")
    if data.test and data.protocol != "cross":
        raise UserError(f"data.test is given with data.protocol: {data.protocol}; allowed with protocol: cross only")
    if data.protocol == "all" and data.fold not in (None, 0):
        raise UserError(f"data.fold is {data.fold} with data.protocol: all; allowed: null, as there is one fold")
    if data.protocol == "grouped" and data.fold is not None and data.fold >= data.folds:
        raise UserError(f"data.fold is {data.fold}; allowed: 0 to {data.folds - 1} with data.folds: {data.folds}")


def _check_counterfactual(config: Config) -> None:
    counterfactual = config.counterfactual
    if not counterfactual.enabled:
        return
    chances = [
        counterfactual.structure_probability if config.model.structure and config.model.llm != "none" else 0.0,
        counterfactual.appearance_probability,
        counterfactual.neutral_probability,
    ]
    possible = sum(chance > 0 for chance in chances)
    if counterfactual.branches > possible:
        raise UserError(
            f"counterfactual.branches is {counterfactual.branches}, but {possible} interventions have a chance; "
            f"allowed: 0 to {possible} (structure needs model.structure and an LLM)"
        )


def _check_batch(config: Config) -> None:
    training = config.training
    per_step = training.micro_batch * (training.processes or 1)
    if training.global_batch % per_step:
        raise UserError(
            f"training.global_batch is {training.global_batch}; allowed: a multiple of micro_batch x processes = "
            f"{per_step}"
        )
