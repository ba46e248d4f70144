"""The typed configuration of a run: dataclass groups, strict YAML and command-line overrides.

This package imports neither torch nor transformers, so that a login node can check a run file in a blink.
"""

from aullm_dist.config.launcher import refuse_launcher
from aullm_dist.config.loader import apply_overrides, from_dict, load, to_dict
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
    "Config",
    "CounterfactualConfig",
    "DataConfig",
    "ModelConfig",
    "MonitorConfig",
    "Strategy",
    "TrainingConfig",
    "apply_overrides",
    "configs_folder",
    "find_config",
    "from_dict",
    "load",
    "load_strategy",
    "offloaded_to",
    "refuse_launcher",
    "shipped_names",
    "to_dict",
]
