"""Find what a step does that a GPU would make the host wait for, and the types that its modules compute in."""

import collections
import contextlib
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("aullm_dist", "aullm_kernels", "deepspeed")
_aten = torch.ops.aten
_READS = {
    getattr(_aten, name).default
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal")
} | {_aten.repeat_interleave.Tensor}
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)


class Watch(TorchDispatchMode):
    """Count, by what and where, every wait of the host for `device` while it is entered."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device
        self.found: collections.Counter[str] = collections.Counter()
        self._synchronize = torch.cuda.synchronize

    def __enter__(self):
        torch.cuda.synchronize = self._synchronized
        return super().__enter__()

    def __exit__(self, *raised):
        torch.cuda.synchronize = self._synchronize
        return super().__exit__(*raised)

    def _synchronized(self, device=None):
        self._note("synchronize")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.device.type == self.device for tensor in tensors)
        if function in _READS and on_device:
            self._note(str(function))
        elif function is _aten._to_copy.default and kwargs.get("device") is not None:
            self._note_copy(args[0].device, torch.device(kwargs["device"]), bool(kwargs.get("non_blocking")), args[0])
        elif function is _aten.copy_.default:
            waits_not = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            self._note_copy(args[1].device, args[0].device, waits_not, args[1])
        elif function in _INDEXING and on_device:
            for index in filter(lambda given: given is not None, args[1]):
                if index.dtype == torch.bool:
                    self._note("index by mask")
                elif index.device.type == "cpu":
                    self._note("index from the host")
        return function(*args, **kwargs)

    def _note_copy(self, source, target, non_blocking, tensor):
        if source.type == target.type:
            return
        if not non_blocking:
            self._note(f"copy {source.type} to {target.type}")
        elif source.type == "cpu" and not tensor.is_pinned():
            # It is staged on the host, which waits for as long as that takes.
            self._note("copy from memory that is not pinned")

    def _note(self, what):
        self.found[f"{what} at {_place()}"] += 1


def _place() -> str:
    passed = ("/fakegpu/", "/deepspeed/accelerator/")
    frames = [frame for frame in traceback.extract_stack() if not any(part in frame.filename for part in passed)]
    known = [frame for frame in frames if any(f"/{name}/" in frame.filename for name in _PACKAGES)]
    frame = (known or frames)[-1]
    name = frame.filename.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
    return f"{name} ({frame.name})"


@contextlib.contextmanager
def watched_types(model: torch.nn.Module, found: dict[str, str]):
    """Record of every module the types that it gets and returns, by its name."""

    def types_of(value):
        leaves = torch.utils._pytree.tree_leaves(value)
        return sorted({str(leaf.dtype)[6:] for leaf in leaves if isinstance(leaf, torch.Tensor)})

    def hook(name):
        def after(module, inputs, output):
            found[f"{name} ({type(module).__name__})"] = f"{types_of(inputs)} -> {types_of(output)}"

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
