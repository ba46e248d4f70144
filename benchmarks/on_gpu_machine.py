"""Print what a process of `on_gpu.py` finds here as one line of JSON: GPUs, packages, versions, commit."""

import json
import platform
import shutil
import subprocess
from importlib.util import find_spec

import torch
from common import GIB, commit, cores, cpu_name, gpu_names, versions

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "datasets", "numpy",
)  # fmt: skip
IMPORTED = (*PACKAGES, "pytest", "pydantic", "cv2", "pyarrow", "openpyxl")


def main() -> None:
    """Print the line."""
    names = gpu_names()
    gib = min((torch.cuda.get_device_properties(index).total_memory / GIB for index in range(len(names))), default=0.0)
    print(
        json.dumps(
            {
                "gpus": names, "gib": gib, "driver": driver(), "cpu": cpu_name(), "cores": cores(),
                "python": platform.python_version(), "packages": [name for name in IMPORTED if find_spec(name)],
                "versions": versions(PACKAGES), "commit": commit(),
            }
        )
    )  # fmt: skip


def driver() -> str | None:
    """Return the driver's version, None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return f"driver {done.stdout.splitlines()[0]}" if done.returncode == 0 and done.stdout else None


if __name__ == "__main__":
    main()
