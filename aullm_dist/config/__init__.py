"""Defines and loads the typed configuration of a run: dataclass groups, strict YAML, command-line overrides.

This package imports neither torch nor transformers, so that a login node can check a run file in a blink.
"""

from aullm_dist.config.derived import (
    different_settings,
    differing,
    function_settings,
    llm_only,
    may_differ,
    release_settings,
    to_record,
)
from aullm_dist.config.groups import check_groups, choose_groups, refuse_other_sharding
from aullm_dist.config.launcher import refuse_launcher
from aullm_dist.config.loader import (
    UNSAID,
    checked,
    from_dict,
    load,
    load_recorded,
    read_run_file,
    to_dict,
    with_overrides,
)
from aullm_dist.config.model_settings import BUILT, NETWORKS
from aullm_dist.config.schema import (
    Config,
    CounterfactualConfig,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    TrainingConfig,
)
from aullm_dist.config.sharding import offloaded_to
from aullm_dist.config.shipped import configs_folder, find_config, shipped_names
from aullm_dist.config.strategy import Strategy, load_strategy

__all__ = [
    "BUILT",
    "NETWORKS",
    "UNSAID",
    "Config",
    "CounterfactualConfig",
    "DataConfig",
    "ModelConfig",
    "MonitorConfig",
    "Strategy",
    "TrainingConfig",
    "check_groups",
    "checked",
    "choose_groups",
    "configs_folder",
    "different_settings",
    "differing",
    "find_config",
    "from_dict",
    "function_settings",
    "llm_only",
    "load",
    "load_recorded",
    "load_strategy",
    "may_differ",
    "offloaded_to",
    "read_run_file",
    "refuse_launcher",
    "refuse_other_sharding",
    "release_settings",
    "shipped_names",
    "to_dict",
    "to_record",
    "with_overrides",
]
