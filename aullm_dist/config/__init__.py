"""The typed configuration of a run: dataclass groups, strict YAML and command-line overrides.

This package imports neither torch nor transformers, so that a login node can check a run file in a blink.
"""

from aullm_dist.config.loader import configs_folder, find_config, from_dict, load, to_dict
from aullm_dist.config.schema import (
    Config,
    CounterfactualConfig,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    TrainingConfig,
)

__all__ = [
    "Config",
    "CounterfactualConfig",
    "DataConfig",
    "ModelConfig",
    "MonitorConfig",
    "TrainingConfig",
    "configs_folder",
    "find_config",
    "from_dict",
    "load",
    "to_dict",
]
