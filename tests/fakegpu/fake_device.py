"""Make a device "cuda" of this CPU, for a torch that was built without GPUs: host memory, CPU kernels, a GPU's checks.

Import before torch. What a GPU does and this does not: compute asynchronously, order work by streams, run compiled
kernels, run out of memory. Several processes meet through gloo on the memory behind their tensors, in place of NCCL.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
import types
import warnings
from pathlib import Path

assert "torch" not in sys.modules, "the device registers itself while torch is loaded"
_TORCH = Path(importlib.util.find_spec("torch").origin).parent  # found, not imported
CAPABILITY = tuple(map(int, os.environ.get("FAKE_GPU_CAPABILITY", "7.5").split(".")))
"""Of which there are no kernels, so that plain PyTorch runs in their place."""
NAME = "NVIDIA H200"
GIB = 2**30
syncs: list[str] = []
"""Calls of `torch.cuda.synchronize`."""


def build_library(folder: Path) -> Path:
    """Compile fake_cuda.cpp against the installed torch (half a minute), unless `folder` has that very library."""
    source = Path(__file__).with_name("fake_cuda.cpp")
    version = (_TORCH / "version.py").read_text()
    name = hashlib.sha256((source.read_text() + version + sys.version).encode()).hexdigest()[:16]
    library = folder / f"libfakecuda-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        includes = [_TORCH / "include", _TORCH / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
        partial = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *[f"-I{path}" for path in includes], str(source)]
        command += ["-o", str(partial), f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        partial.rename(library)
    return library


for _name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(_TORCH / "lib" / _name), mode=ctypes.RTLD_GLOBAL)
_lib = ctypes.CDLL(str(build_library(Path(os.environ["FAKE_GPU_BUILD"]))), mode=ctypes.RTLD_GLOBAL)
_lib.fakegpu_live.restype = _lib.fakegpu_peak.restype = ctypes.c_size_t

import bitsandbytes  # noqa: F401 - before there is a GPU: its CUDA library cannot be loaded
import torch
import torch.distributed as dist
import torch.nn.functional as F
from host_waits import Watch
from torch.distributed import distributed_c10d as c10d


class Event:
    """Stands for torch.cuda.Event; its moment is the host's."""

    def __init__(self, *_: object, **__: object) -> None:
        self.moment = 0.0

    def record(self, stream: object = None) -> None:
        self.moment = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.moment - self.moment)


class Stream:
    """Stands for torch.cuda.Stream; there is one, which is always the current."""

    device_index = cuda_stream = stream_id = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cuda", _lib.fakegpu_get_device())

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True


class _Device:
    def __init__(self, device: object) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before = _lib.fakegpu_get_device()
        _set_device(self.device if self.device is not None else 0)

    def __exit__(self, *_: object) -> None:
        _lib.fakegpu_set_device(self.before)


def _set_device(device: object) -> None:
    device = torch.device(device) if isinstance(device, str) else device
    _lib.fakegpu_set_device(device if isinstance(device, int) else (device.index or 0))


_watches: list = []
"""What looks for waits of the host while torch is told to warn of them."""


def _set_sync_debug_mode(mode: int | str) -> None:
    """Warn of what makes the host wait, once for each place and when torch is told to stop."""
    if mode in (0, "default"):
        while _watches:
            watch = _watches.pop()
            watch.__exit__(None, None, None)
            for what in watch.found:
                warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)
    elif not _watches:
        _watches.append(Watch().__enter__())


def _put_in_torch_cuda() -> None:
    properties = types.SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=141 * GIB, multi_processor_count=132,
        uuid="0000", gcnArchName="", warp_size=32, shared_memory_per_block_optin=232448, L2_cache_size=60 << 20,
    )  # fmt: skip
    # Where these names are not yet bound in torch.cuda, setting them binds them.
    stands = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "is_initialized": lambda: False,
        "_is_in_bad_fork": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "current_device": lambda: _lib.fakegpu_get_device(),
        "set_device": _set_device,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: properties,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "synchronize": lambda device=None: syncs.append("synchronize"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "mem_get_info": lambda device=None: (140 * GIB, 141 * GIB),
        "memory_allocated": lambda device=None: _lib.fakegpu_live(),
        "max_memory_allocated": lambda device=None: _lib.fakegpu_peak(),
        "reset_peak_memory_stats": lambda device=None: _lib.fakegpu_reset_peak(),
        "memory_stats": lambda device=None: {},
        "memory_reserved": lambda device=None: _lib.fakegpu_live(),
        "max_memory_reserved": lambda device=None: _lib.fakegpu_live(),
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": _Device,
    }
    for name, stand in stands.items():
        setattr(torch.cuda, name, stand)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: 0)
    torch.Tensor.record_stream = lambda self, stream: None


_real_attention = F.scaled_dot_product_attention


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention of plain products, which is what the CPU has of what a GPU would choose from."""
    if not query.is_cuda:
        return _real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) if x.is_floating_point() else x for x in (query, key, value))
    plain = torch.ops.aten._scaled_dot_product_attention_math
    with torch.autocast("cuda", enabled=False):
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


_COLLECTIVES = """
all_reduce broadcast all_gather all_gather_into_tensor all_gather_single _all_gather_base reduce_scatter_tensor
reduce_scatter_single _reduce_scatter_base reduce_scatter reduce gather scatter all_to_all_single send recv isend irecv
""".split()


class _Work:
    """What an asynchronous collective returns; keeps its tensors until it is waited for, as NCCL's does."""

    def __init__(self, work: object, tensors: object) -> None:
        self._work, self._tensors = work, tensors

    def wait(self, *arguments: object) -> bool:
        done = self._work.wait(*arguments)
        self._tensors = None
        return done

    def __getattr__(self, name: str) -> object:
        return getattr(self._work, name)

    def __del__(self) -> None:
        if self._tensors is not None:
            self._work.wait()


def _on_host(value):
    if isinstance(value, torch.Tensor):
        return torch.ops.fakegpu.as_cpu(value.detach()) if value.is_cuda else value
    return type(value)(map(_on_host, value)) if isinstance(value, list | tuple) else value


def _put_in_distributed() -> None:
    def through_host(real):
        def call(*arguments, **named):
            work = real(*map(_on_host, arguments), **{name: _on_host(value) for name, value in named.items()})
            return work if work is None or not isinstance(work, dist.Work) else _Work(work, (arguments, named))

        call.__name__ = real.__name__
        return call

    begin, barrier = c10d.init_process_group, c10d.barrier
    for module in (dist, c10d):
        for name in _COLLECTIVES:
            if hasattr(module, name):
                setattr(module, name, through_host(getattr(module, name)))
        module.init_process_group = lambda backend=None, *a, device_id=None, **k: begin("gloo", *a, **k)
        module.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)
        module.is_nccl_available = lambda: True
    os.environ.setdefault("DS_ACCELERATOR", "cuda")


WATTS = 350.0
"""What the device draws."""


class _NVMLError(Exception):
    pass


def _put_in_nvml() -> None:
    """Answer what is asked of the driver about power and memory, as `pynvml` does."""

    def handle(uuid: bytes) -> int:
        if uuid != b"GPU-0000":
            raise _NVMLError(f"no device {uuid!r}")
        return 0

    sys.modules["pynvml"] = types.SimpleNamespace(
        NVMLError=_NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetPowerUsage=lambda device: round(1e3 * WATTS),
        nvmlDeviceGetMemoryInfo=lambda device: types.SimpleNamespace(free=140 * GIB, total=141 * GIB),
    )  # fmt: skip


def _put_in_storages() -> None:
    def as_bytes(storage):
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        view.set_(storage)
        return torch.ops.fakegpu.as_cpu(view) if storage.device.type == "cuda" else view

    to_cpu, copy = torch.UntypedStorage.cpu, torch.UntypedStorage.copy_

    def cpu(self):
        return as_bytes(self).clone().untyped_storage() if self.device.type == "cuda" else to_cpu(self)

    def copy_(self, source, non_blocking=None):
        if "cuda" not in (self.device.type, source.device.type):
            return copy(self, source, non_blocking)
        as_bytes(self).copy_(as_bytes(source))
        return self

    torch.UntypedStorage.cpu, torch.UntypedStorage.copy_ = cpu, copy_


def _put_in_bitsandbytes() -> None:
    """Have kernels that pack and unpack take no memory but their results', as a GPU's; in plain torch they do."""

    def on_host(operation):
        def kernel(*arguments):
            found = operation(*map(_on_host, arguments))
            return tuple(part.cuda() for part in found) if isinstance(found, tuple) else found.cuda()

        return kernel

    for name in ("quantize_4bit", "quantize_blockwise", "dequantize_4bit", "dequantize_blockwise"):
        operation = getattr(torch.ops.bitsandbytes, name).default
        torch.library.register_kernel(f"bitsandbytes::{name}", "cuda", on_host(operation))


_put_in_torch_cuda()
_put_in_distributed()
_put_in_bitsandbytes()
_put_in_storages()
_put_in_nvml()
F.scaled_dot_product_attention = _attention
