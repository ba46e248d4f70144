"""Trains one backbone type after the other in the processes that are here, whatever their number.

Started by test_backbone_types: one life of two processes costs what ten would cost each.

    many_backbones.py STRATEGY SETTINGS.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from training_runs import train_here


def main() -> int:
    strategy, file = sys.argv[1], Path(sys.argv[2])
    # DeepSpeed keeps the first run's group for as long as the process lives.
    end_group = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None
    for name, settings in json.loads(file.read_text()).items():
        code = train_here(*settings, f"training.strategy={strategy}")
        assert code == 0, f"{name} under {strategy} ended with {code}"
    if torch.distributed.is_initialized():
        end_group()
    return 0


if __name__ == "__main__":
    from aullm_dist.runtime.exits import leave

    leave(main())
