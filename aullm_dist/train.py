"""Runs the main job: `accelerate launch --quiet aullm_dist/train.py [--config FILE] [section.key=value ...]`."""

import os
import sys

# `accelerate launch aullm_dist/train.py` puts this file's folder first on the path, where our modules would shadow
# others.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]

if __name__ == "__main__":
    from aullm_dist.runtime.gpu import let_memory_grow

    let_memory_grow(os.environ)
    from aullm_dist.commands.train import main
    from aullm_dist.runtime.exits import crash, leave

    sys.excepthook = crash
    leave(main(sys.argv[1:]))
