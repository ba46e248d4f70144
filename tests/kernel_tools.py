"""What the tests of the Triton kernels share: where they run, how they are compared, traps for stray reads and writes.

Without a GPU the kernels run in Triton's interpreter, on the CPU; with one they are compiled.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from aullm_kernels import EdgeTable
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = "triton" if DEVICE == "cuda" else "interpret"
# Relative Frobenius error against float64. A GPU's bfloat16 products and the interpreter's truncating casts differ.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5 if DEVICE == "cuda" else 5e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2 if DEVICE == "cuda" else 8e-3,
}
_FENCE, _SENTINEL = 64, 12345.0


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error, the absolute one where `expected` is nearly 0; infinity is refused."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all(), "not finite"
    size = expected.norm().item()
    return (found - expected).norm().item() / (size if size > 1e-6 else 1.0)


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor | None = None) -> dict:
    """Return the result of `function` under `out` and the gradient of each input under its name."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = function(**leaves)
    out.backward(torch.ones_like(out) if grad is None else grad.to(out.dtype))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def random_edges(nodes: int, edges: int, relations: int, seed: int = 0) -> EdgeTable:
    """Random edges between random nodes, some of them twice; the last node has outgoing edges only."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: torch.randint(0, max(1, high), (edges,), generator=generator)  # noqa: E731
    return EdgeTable(draw(nodes - 1), draw(nodes), draw(relations), nodes).to(DEVICE)


@contextmanager
def poisoned_and_fenced(monkeypatch) -> Iterator[list[Tensor]]:
    """Allocate what the kernels fill as NaN between sentinels; at the end the sentinels must be whole.

    Yields:
        What has been allocated; whatever of it is handed out must hold no NaN.
    """
    allocated, fences = [], []

    def fenced(like: Tensor) -> Tensor:
        if not like.is_floating_point() or like.numel() == 0:
            return like
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        storage = torch.full((extent + 2 * _FENCE,), _SENTINEL, dtype=like.dtype, device=like.device)
        inner = storage[_FENCE:-_FENCE].as_strided(like.shape, like.stride(), _FENCE)
        inner.fill_(float("nan"))
        allocated.append(inner)
        fences.append((storage[:_FENCE], storage[-_FENCE:]))
        return inner

    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fenced(new_empty(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: fenced(empty_like(*a, **k)))
        yield allocated
    assert all((part == part.new_tensor(_SENTINEL)).all() for pair in fences for part in pair), "written out of bounds"


def inside_nan(value: Tensor) -> Tensor:
    """Copy `value` between NaN: what is read beside it shows in the result."""
    storage = torch.full((value.numel() + 2 * _FENCE,), float("nan"), dtype=value.dtype, device=value.device)
    inner = storage[_FENCE : _FENCE + value.numel()].view(value.shape)
    inner.copy_(value)
    return inner


@contextmanager
def rounding_casts(monkeypatch) -> Iterator[None]:
    """Let the interpreter round to bfloat16 as a GPU does; it truncates, which doubles the error of a result."""
    if DEVICE == "cuda":
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, input_dtype, output_dtype, mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return convert(data, input_dtype, output_dtype, mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


@contextmanager
def shuffled_programs(monkeypatch, seed: int) -> Iterator[None]:
    """Run the interpreter's programs in a random order: two that write the same place then disagree."""
    from triton.runtime.interpreter import interpreter_builder as builder

    order: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    generator = random.Random(seed)

    def dim(*sizes: int) -> None:
        programs = list(itertools.product(*map(range, sizes)))
        order.clear()
        order.update(zip(programs, generator.sample(programs, len(programs)), strict=True))
        set_dim(*sizes)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", dim, raising=False)
        patch.setattr(builder, "set_grid_idx", lambda *at: set_index(*order[at]), raising=False)
        yield
