"""Checks a configuration beyond types: what each setting allows, and combinations that cannot work."""

from aullm_dist.config.allowed import is_nullable
from aullm_dist.config.groups import check_groups
from aullm_dist.config.model_settings import NETWORKS
from aullm_dist.config.schema import Config, settings
from aullm_dist.config.training_settings import TRACKERS
from aullm_dist.errors import UserError

_LARGEST = 2**31 - 1
"""Of whole numbers without an upper end of their own: libraries take no larger ones."""


def check(config: Config) -> None:
    """Refuse values and combinations that cannot work.

    Raises:
        UserError: one line with the key, what it is and what is allowed.
    """
    for setting in settings():
        value, allowed = setting.value(config), setting.about.allowed
        if type(value) is int and abs(value) > _LARGEST and getattr(allowed, "at_most", None) is None:
            raise UserError(f"{setting.name} is {value}; allowed: whole numbers up to {_LARGEST}")
        if allowed is None or value is None:
            continue
        refusal = allowed.refusal(setting.name, value, is_nullable(setting.kind))
        if refusal is not None:
            raise UserError(refusal)
    _check_model(config)
    _check_data(config)
    _check_counterfactual(config)
    _check_batch(config)
    _check_trackers(config)


def _check_model(config: Config) -> None:
    model = config.model
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
    _check_networks(config)
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


def _check_trackers(config: Config) -> None:
    names = config.monitor.trackers
    for name in names:
        if name not in TRACKERS and not _names_a_class(name):
            raise UserError(
                f"monitor.trackers has {name!r}; allowed: {', '.join(TRACKERS)}, or package.module:Class of your own"
            )
    if len(set(names)) != len(names):
        raise UserError(f"monitor.trackers is {list(names)}; allowed: each tracker once")


def _names_a_class(name: str) -> bool:
    module, colon, kind = name.partition(":")
    return bool(colon) and kind.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _check_networks(config: Config) -> None:
    named = [("model.network", config.model.network), *(("training.baseline", n) for n in config.training.baselines())]
    for key, name in named:
        if name not in NETWORKS and not _names_a_class(name):
            raise UserError(f"{key} is {name!r}; allowed: {', '.join(NETWORKS)}, or package.module:Class of your own")
    names = config.training.baselines()
    if len(set(names)) != len(names):
        raise UserError(f"training.baseline is {names}; allowed: each network once")
    if config.model.llm != "none" and config.model.network != "led_cnn":
        raise UserError(
            f"model.network is {config.model.network!r} with model.llm: {config.model.llm}; allowed: with llm: none"
        )


def _check_data(config: Config) -> None:
    data = config.data
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
    if training.processes is not None or training.folds_at_once in (1, "auto"):
        check_groups(training, training.processes or 1)
