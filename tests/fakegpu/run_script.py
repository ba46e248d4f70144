"""Run a script, a folder with `__main__.py`, or `-m module` on the fake GPU, as `python` would.

FAKE_GPU_BUILD=build/fakegpu python tests/fakegpu/run_script.py SCRIPT [ARGUMENT ...]
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("FAKE_GPU_BUILD", str(Path(__file__).parents[2] / "build" / "fakegpu"))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import fake_device  # noqa: F401

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.pop(0)
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        name = sys.argv.pop(1)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
