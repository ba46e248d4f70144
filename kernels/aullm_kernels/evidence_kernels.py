"""Implements `evidence_pool` in Triton: one program reads the cells of one clip once, forward and backward.

Every row of the result is an attention: the mean and the region means are attention with a query of zero, over all
cells or over those of a region. So one tile of scores, at most 32 rows, gives them all, and each tile of cells is
read once per pass. The backward pass recomputes the scores; no weight lives in here, hence nothing is summed over
programs and nothing is left to chance.

Rules that the interpreter and the compiler both need: everything is cast to `ACC` after it is loaded, the operands of a
product to `DOT`; masked loads name `other`; program ids become 64-bit before they address anything.

Letters: b clip, n cell, c channel, r row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aullm_kernels.launch import Numbers, launch, numbers
from aullm_kernels.tables import tile


@triton.jit
def _load_cells(cells_ptr, i_n, i_c, b_keep, stride_n, stride_c, C: tl.constexpr, ACC: tl.constexpr):
    """A tile of cells `[BLOCK_N, BLOCK_C]`; cells that do not count, and what they hold, become 0."""
    inside = b_keep[:, None] & (i_c < C)[None, :]
    return tl.load(cells_ptr + i_n[:, None] * stride_n + i_c[None, :] * stride_c, mask=inside, other=0.0).to(ACC)


@triton.jit
def _load_keep(valid_ptr, i_n, N, stride_vn, HAS_VALID: tl.constexpr):
    inside = i_n < N
    if HAS_VALID:
        inside = inside & (tl.load(valid_ptr + i_n * stride_vn, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _row_members(regions_ptr, i_n, i_r, b_keep, N, H, num_regions):
    """Which cell belongs to which row, `[ROWS, BLOCK_N]`: all to heads and mean, those of a region to its row."""
    b_region = tl.load(regions_ptr + i_n, mask=i_n < N, other=-1).to(tl.int32)
    of_region = (b_region[None, :] == (i_r - H - 1)[:, None]) & (i_r <= H + num_regions)[:, None]
    return b_keep[None, :] & ((i_r <= H)[:, None] | of_region)


@triton.jit
def _evidence_pool_forward_kernel(
    out_ptr, pooled_ptr, stats_ptr,
    cells_ptr, queries_ptr, regions_ptr, valid_ptr, join_ptr,
    N, H, num_regions, J, scale,
    stride_b, stride_n, stride_c, stride_vb, stride_vn,
    C: tl.constexpr, HAS_VALID: tl.constexpr, HAS_JOIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b = tl.cast(tl.program_id(0), tl.int64)
    i_r = tl.arange(0, ROWS)
    i_c = tl.arange(0, BLOCK_C)
    num_rows = H + 1 + num_regions
    channel = (i_c < C)[None, :]
    row_offset = i_r[:, None] * C + i_c[None, :]
    is_head = (i_r < H)[:, None] & channel
    factor = tl.full((), scale, ACC)
    cells_ptr += i_b * stride_b
    if HAS_VALID:
        valid_ptr += i_b * stride_vb
    b_q = tl.load(queries_ptr + i_b * H * C + row_offset, mask=is_head, other=0.0).to(ACC)

    b_max = tl.full((ROWS,), float("-inf"), ACC)
    b_sum = tl.zeros((ROWS,), ACC)
    b_acc = tl.zeros((ROWS, BLOCK_C), ACC)
    for start in range(0, N, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_keep = _load_keep(valid_ptr, i_n, N, stride_vn, HAS_VALID)
        b_m = _load_cells(cells_ptr, i_n, i_c, b_keep, stride_n, stride_c, C, ACC)
        b_s = tl.dot(b_q.to(DOT), tl.trans(b_m).to(DOT), input_precision=PRECISION, out_dtype=ACC) * factor
        member = _row_members(regions_ptr, i_n, i_r, b_keep, N, H, num_regions)
        b_s = tl.where(member, b_s, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_s, axis=1))
        # A row without any cell so far has no maximum; 0 stands in for it, and its weights are exp(-inf) = 0.
        b_safe = tl.where(b_top == float("-inf"), tl.zeros((ROWS,), ACC), b_top)
        b_p = tl.exp(b_s - b_safe[:, None])
        shrink = tl.exp(b_max - b_safe)
        b_sum = b_sum * shrink + tl.sum(b_p, axis=1)
        b_acc = b_acc * shrink[:, None]
        b_acc += tl.dot(b_p.to(DOT), b_m.to(DOT), input_precision=PRECISION, out_dtype=ACC)
        b_max = b_top

    some = b_sum > 0
    b_inverse = tl.where(some, 1.0 / tl.where(some, b_sum, 1.0), 0.0)
    b_acc = b_acc * b_inverse[:, None]
    used = (i_r < num_rows)[:, None] & channel
    out_ptr += i_b * (num_rows * C + J)
    tl.store(out_ptr + row_offset, b_acc.to(out_ptr.dtype.element_ty), mask=used)
    tl.store(pooled_ptr + i_b * H * C + row_offset, b_acc, mask=is_head)
    stats_ptr += i_b * 2 * ROWS
    tl.store(stats_ptr + i_r, tl.where(some, b_max, tl.zeros((ROWS,), ACC)))
    tl.store(stats_ptr + ROWS + i_r, b_inverse)
    if HAS_JOIN:
        for start in range(0, J, BLOCK_C):
            i_j = start + i_c
            b_join = tl.load(join_ptr + i_b * J + i_j, mask=i_j < J, other=0.0).to(ACC)
            tl.store(out_ptr + num_rows * C + i_j, b_join.to(out_ptr.dtype.element_ty), mask=i_j < J)


@triton.jit
def _evidence_pool_backward_kernel(
    d_cells_ptr, d_queries_ptr,
    grad_ptr, cells_ptr, queries_ptr, regions_ptr, valid_ptr, pooled_ptr, stats_ptr,
    N, H, num_regions, grad_stride, scale,
    stride_b, stride_n, stride_c, stride_vb, stride_vn, stride_db, stride_dn, stride_dc,
    C: tl.constexpr, HAS_VALID: tl.constexpr, NEED_D_CELLS: tl.constexpr, NEED_D_QUERIES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b = tl.cast(tl.program_id(0), tl.int64)
    i_r = tl.arange(0, ROWS)
    i_c = tl.arange(0, BLOCK_C)
    channel = (i_c < C)[None, :]
    row_offset = i_r[:, None] * C + i_c[None, :]
    head = i_r < H
    is_head = head[:, None] & channel
    factor = tl.full((), scale, ACC)
    cells_ptr += i_b * stride_b
    if HAS_VALID:
        valid_ptr += i_b * stride_vb
    if NEED_D_CELLS:
        d_cells_ptr += i_b * stride_db
    stats_ptr += i_b * 2 * ROWS
    b_q = tl.load(queries_ptr + i_b * H * C + row_offset, mask=is_head, other=0.0).to(ACC)
    b_pooled = tl.load(pooled_ptr + i_b * H * C + row_offset, mask=is_head, other=0.0).to(ACC)
    used = (i_r < H + 1 + num_regions)[:, None] & channel
    b_max = tl.load(stats_ptr + i_r)
    b_inverse = tl.load(stats_ptr + ROWS + i_r)
    # The weights stay below 1 as exp(score - maximum), exact for the means; their sum divides the gradient instead.
    b_g = tl.load(grad_ptr + i_b * grad_stride + row_offset, mask=used, other=0.0).to(ACC) * b_inverse[:, None]
    b_delta = tl.sum(b_g * b_pooled, axis=1)

    b_dq = tl.zeros((ROWS, BLOCK_C), ACC)
    for start in range(0, N, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_keep = _load_keep(valid_ptr, i_n, N, stride_vn, HAS_VALID)
        b_m = _load_cells(cells_ptr, i_n, i_c, b_keep, stride_n, stride_c, C, ACC)
        b_mt = tl.trans(b_m).to(DOT)
        b_s = tl.dot(b_q.to(DOT), b_mt, input_precision=PRECISION, out_dtype=ACC) * factor
        member = _row_members(regions_ptr, i_n, i_r, b_keep, N, H, num_regions)
        b_p = tl.where(member, tl.exp(tl.where(member, b_s - b_max[:, None], 0.0)), 0.0)
        b_dp = tl.dot(b_g.to(DOT), b_mt, input_precision=PRECISION, out_dtype=ACC)
        b_ds = tl.where(head[:, None], b_p * (b_dp - b_delta[:, None]), 0.0) * factor
        if NEED_D_CELLS:
            b_dm = tl.dot(tl.trans(b_p).to(DOT), b_g.to(DOT), input_precision=PRECISION, out_dtype=ACC)
            b_dm += tl.dot(tl.trans(b_ds).to(DOT), b_q.to(DOT), input_precision=PRECISION, out_dtype=ACC)
            tl.store(
                d_cells_ptr + i_n[:, None] * stride_dn + i_c[None, :] * stride_dc,
                b_dm.to(d_cells_ptr.dtype.element_ty),
                mask=(i_n < N)[:, None] & channel,
            )
        if NEED_D_QUERIES:
            b_dq += tl.dot(b_ds.to(DOT), b_m.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    if NEED_D_QUERIES:
        d_queries_ptr += i_b * H * C
        tl.store(d_queries_ptr + row_offset, b_dq.to(d_queries_ptr.dtype.element_ty), mask=is_head)


def forward(
    outputs: tuple[Tensor, Tensor, Tensor],
    cells: Tensor,
    queries: Tensor,
    regions: Tensor,
    valid: Tensor | None,
    join: Tensor | None,
    num_regions: int,
) -> None:
    """Fill `outputs`: result `[B, rows * C + J]`, evidence rows in full precision `[B, H, C]`, statistics."""
    out, pooled, stats = outputs
    batch, num_cells, channels = cells.shape
    heads = queries.shape[1]
    types = numbers(cells, queries)
    rows = tile("evidence_pool_forward", _size(cells, queries, num_regions, types))
    launch(
        _evidence_pool_forward_kernel,
        (batch,),
        out,
        pooled,
        stats,
        cells,
        queries.contiguous(),
        regions.contiguous(),
        None if valid is None else valid.view(torch.uint8),
        None if join is None else join.contiguous(),
        num_cells,
        heads,
        num_regions,
        0 if join is None else join.shape[1],
        channels**-0.5,
        *cells.stride(),
        *((0, 0) if valid is None else valid.stride()),
        device=cells.device,
        tile=rows,
        C=channels,
        HAS_VALID=valid is not None,
        HAS_JOIN=join is not None,
        ROWS=rows.size["rows"],
        BLOCK_N=rows.block,
        BLOCK_C=rows.size["channels"],
        ACC=types.acc,
        DOT=types.dot,
        PRECISION=types.precision,
    )


def backward(
    outputs: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
    cells: Tensor,
    queries: Tensor,
    regions: Tensor,
    valid: Tensor | None,
    pooled: Tensor,
    stats: Tensor,
    num_regions: int,
) -> None:
    """Fill `outputs`: gradients of cells and queries, those that are not None, from `grad` `[B, rows * C + J]`."""
    d_cells, d_queries = outputs
    batch, num_cells, channels = cells.shape
    types = numbers(cells, queries)
    rows = tile("evidence_pool_backward", _size(cells, queries, num_regions, types))
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    launch(
        _evidence_pool_backward_kernel,
        (batch,),
        d_cells,
        d_queries,
        grad,
        cells,
        queries.contiguous(),
        regions.contiguous(),
        None if valid is None else valid.view(torch.uint8),
        pooled,
        stats,
        num_cells,
        queries.shape[1],
        num_regions,
        grad.stride(0),
        channels**-0.5,
        *cells.stride(),
        *((0, 0) if valid is None else valid.stride()),
        *((0, 0, 0) if d_cells is None else d_cells.stride()),
        device=cells.device,
        tile=rows,
        C=channels,
        HAS_VALID=valid is not None,
        NEED_D_CELLS=d_cells is not None,
        NEED_D_QUERIES=d_queries is not None,
        ROWS=rows.size["rows"],
        BLOCK_N=rows.block,
        BLOCK_C=rows.size["channels"],
        ACC=types.acc,
        DOT=types.dot,
        PRECISION=types.precision,
    )


def _size(cells: Tensor, queries: Tensor, num_regions: int, types: Numbers) -> dict[str, int]:
    return {
        "rows": queries.shape[1] + 1 + num_regions,
        "channels": cells.shape[2],
        "bits": types.bits,
    }
