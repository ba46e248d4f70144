"""The machine that executes PTX on the CPU: what it computes, and what it refuses, on kernels written by hand."""

import numpy as np
import pytest
import torch
from ptx import arithmetic, warps
from ptx.machine import Machine
from ptx.memory import GlobalMemory, MemoryFaultError
from ptx.program import UnknownPtxError, read

HEAD = """
.visible .entry kernel(
  .param .u64 .ptr .global .align 1 kernel_param_0,
  .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
  .reg .b32 %r<9>;
  ld.param.b64 %rd1, [kernel_param_0];
  ld.param.b64 %rd2, [kernel_param_1];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  cvt.u64.u32 %rd3, %r2;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  ld.global.b32 { %r3 }, [ %rd4 + 0 ];
"""
# Each thread gives its number to the thread of the other warp.
EXCHANGE = """
  st.shared.b32 [%r2], %r3;
  bar.sync 0;
  xor.b32 %r4, %r2, 128;
  ld.shared.b32 %r5, [%r4];
  st.global.b32 [ %rd5 + 0 ], { %r5 };
  ret;
}
"""
COPY = """
  cp.async.ca.shared.global [ %r2 + 0 ], [ %rd4 + 0 ], 0x4, %r6;
  cp.async.commit_group ;
  cp.async.wait_group 0;
  bar.sync 0;
  ld.shared.b32 %r5, [%r2];
  st.global.b32 [ %rd5 + 0 ], { %r5 };
  ret;
}
"""


def run(body: str, *, threads: int = 64, size: int = 64, programs: int = 1) -> torch.Tensor:
    given, out = torch.arange(size, dtype=torch.int32), torch.full((size,), -1, dtype=torch.int32)
    memory = GlobalMemory([given, out])
    parameters = [memory.address(given), memory.address(out)]
    for number in range(programs):
        memory.program = number
        Machine(read(HEAD + body), threads, 256, memory, parameters, (number, 0, 0), (programs, 1, 1)).run()
    memory.copy_back()
    return out


def test_warps_exchange_numbers_across_a_barrier():
    assert torch.equal(run(EXCHANGE), torch.arange(64, dtype=torch.int32).roll(32))


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        (EXCHANGE.replace("bar.sync 0;", ""), "a warp reads what another writes"),
        (EXCHANGE.replace("ret;", "st.shared.b32 [%r2], %r5;\nret;"), "a warp writes what another reads"),
        (EXCHANGE.replace("[%r2]", "[0]").replace("%r4, %r2, 128", "%r4, 0, 0"), "two threads write different values"),
        (EXCHANGE.replace("%r4, %r2, 128", "%r4, %r2, 256"), "outside of the shared memory"),
        (EXCHANGE.replace("[ %rd5 + 0 ]", "[ %rd5 + 4 ]"), "in no tensor"),
        (EXCHANGE.replace("[ %rd5 + 0 ]", "[ %rd5 + 2 ]"), "not aligned"),
        (EXCHANGE.replace("[ %rd5 + 0 ]", "[ %rd2 + 0 ]"), "two threads write different values"),
    ],
)
def test_wrong_uses_of_memory_are_refused(body, refused):
    with pytest.raises(MemoryFaultError, match=refused):
        run(body)


def test_two_programs_may_not_write_to_one_place():
    with pytest.raises(MemoryFaultError, match="two programs write to one place"):
        run(EXCHANGE, programs=2)


def test_copies_arrive_when_they_are_waited_for():
    body = "mov.b32 %r6, 4;" + COPY
    assert torch.equal(run(body), torch.arange(64, dtype=torch.int32))
    late = run(body.replace("wait_group 0", "wait_group 1"))
    assert (late == -1).all(), "shared memory as it was, full of ones"
    assert (run(body.replace("%r6, 4", "%r6, 0")) == 0).all(), "nothing read, zeros written"


def test_what_is_not_known_is_refused():
    with pytest.raises(UnknownPtxError, match="wgmma"):
        run("wgmma.fence.sync.aligned;\nret;\n}")
    with pytest.raises(UnknownPtxError, match="threads of one program part"):
        run("setp.lt.s32 %p1, %r1, 7;\n@%p1 bra $L__1;\n$L__1:\nret;\n}")


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_products_of_fragments_are_products_of_matrices(kind):
    """Fragments as the PTX manual draws them, filled here element by element."""
    rng = np.random.default_rng(0)
    depth = {"bf16": 16, "tf32": 8}[kind]
    # Whole numbers, which both types hold.
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))

    def place(row, column):
        """Bits of an operand's register: one number, or two next to each other."""
        return np.uint32(np.float32(row[column]).view(np.uint32))

    def pair(first, second):
        low, high = (np.float32(value).view(np.uint32) >> np.uint32(16) for value in (first, second))
        return np.uint32(low | (high << np.uint32(16)))

    left, right = [np.zeros(32, np.uint32) for _ in range(4)], [np.zeros(32, np.uint32) for _ in range(2)]
    added = [np.zeros(32, np.float32) for _ in range(4)]
    for lane in range(32):
        group, rest = divmod(lane, 4)
        for index in range(4):
            row = group + 8 * (index % 2)
            column = (2 * rest + 8 * (index // 2)) if kind == "bf16" else (rest + 4 * (index // 2))
            left[index][lane] = pair(a[row, column], a[row, column + 1]) if kind == "bf16" else place(a[row], column)
            added[index][lane] = c[group + 8 * (index // 2), 2 * rest + index % 2]
        for index in range(2):
            row = (2 * rest + 8 * index) if kind == "bf16" else (rest + 4 * index)
            column = b[:, group]
            right[index][lane] = pair(column[row], column[row + 1]) if kind == "bf16" else place(column, row)
    found = warps.multiply(kind, left, right, [values.view(np.uint32) for values in added])
    for lane in range(32):
        group, rest = divmod(lane, 4)
        for index in range(4):
            expected = (a @ b + c)[group + 8 * (index // 2), 2 * rest + index % 2]
            assert found[index].view(np.float32)[lane] == expected


def test_matrices_are_spread_over_a_warp_and_gathered_again():
    rows = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for transposed in (False, True):
        spread = warps.spread_rows(rows.view(np.uint8), transposed)
        held = (rows.T if transposed else rows).reshape(32, 2)
        assert np.array_equal(spread.view(np.uint16).reshape(32, 2), held)
        assert np.array_equal(warps.gather_rows(spread, transposed).view(np.uint16), rows)


def test_a_warp_shares_its_largest_number():
    body = """
  cvt.rn.f32.s32 %r6, %r3;
  redux.sync.max.f32 %r7, %r6, -1;
  cvt.rzi.s32.f32 %r8, %r7;
  st.global.b32 [ %rd5 + 0 ], { %r8 };
  ret;
}
"""
    assert run(body).tolist() == [31] * 32 + [63] * 32


def test_conversions_round_as_a_gpu_does():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    rounded = torch.from_numpy(arithmetic.f32_to_bf16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(rounded, values.bfloat16())
    function, _, _ = arithmetic.find("cvt.rna.tf32.f32")
    half = np.array([1 + 2**-11, -1 - 2**-11, 1 + 2**-12], np.float32).view(np.uint32)
    assert function(half).view(np.float32).tolist() == [1 + 2**-10, -1 - 2**-10, 1.0]
    assert arithmetic.find("shl.b32")[0](np.uint32([1, 1]), np.uint32([31, 32])).tolist() == [1 << 31, 0]
    assert arithmetic.find("bfe.s32")[0](np.int32([0b110]), np.uint32(1), np.uint32(2)).tolist() == [-1]
    assert (
        arithmetic.find("prmt.b32")[0](np.uint32([0x33221100]), np.uint32(0x77665544), np.uint32(0x5410)) == 0x55441100
    )


def test_arithmetic_that_blackwell_alone_has():
    """Two numbers in one register, three operands of a maximum, and operands of two types."""
    body = """
  mov.b32 %r6, 0f40000000;
  cvt.rn.f32.s32 %r7, %r1;
  mov.b64 %rd6, {%r7, %r6};
  fma.rn.f32x2 %rd7, %rd6, %rd6, %rd6;
  mov.b64 {%r8, %r9}, %rd7;
  cvt.rn.bf16.f32 %rs1, %r6;
  add.rn.f32.bf16 %r10, %rs1, %r9;
  max.f32 %r11, %r8, %r10, 0f00000000;
  cvt.rzi.s32.f32 %r12, %r11;
  st.global.b32 [ %rd5 + 0 ], { %r12 };
  ret;
}
"""
    numbers = torch.arange(64, dtype=torch.int32)
    # x * x + x, and 2 * 2 + 2 with another 2 on top.
    assert torch.equal(run(body), (numbers * numbers + numbers).clamp(min=8))
