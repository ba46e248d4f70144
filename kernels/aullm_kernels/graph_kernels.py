"""Implements `graph_attention` in Triton: the edges are fixed and few, so every node holds its incoming edges at once.

Forward: a program owns the nodes of one tile in one feature row and head. It gathers their neighbours, scores them
once, and runs softmax and weighted sum for each branch of that feature row. Backward: a first pass over the incoming
edges recomputes that, and gives the gradients of `xl`, of the strengths and of the parameters; it writes each edge's
weight and score gradient, from which a second pass over the outgoing edges sums the gradient of `xr`. Every number is
written by one program: no atomics. Gradients of parameters are partial sums of a fixed number of programs.

Rules that the interpreter and the compiler both need: everything is cast to `ACC` after it is loaded; masked loads name
`other`; program ids become 64-bit before they address anything; slots live in tuples, unrolled.

Letters: v feature row, g branch, a node, h head, e edge, k slot, f feature, r relation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aullm_kernels.buffers import Branches, GraphGradients
from aullm_kernels.launch import INTERPRETING, launch, numbers
from aullm_kernels.tables import Tile, tile


@triton.jit
def _load_slot(slots_ptr, k, i_a, A, degree):
    """Edge, node at its other end and relation of slot `k` of each node; -1 where the slot is free."""
    # One comparison: the interpreter's `&` of a block and a single truth value is no mask.
    there = i_a < tl.where(degree > k, A, 0)
    at = slots_ptr + k * A + i_a
    plane = degree * A
    i_e = tl.load(at, mask=there, other=-1)
    i_n = tl.load(at + plane, mask=there, other=-1)
    i_r = tl.load(at + 2 * plane, mask=there, other=-1)
    return i_e, i_n, i_r


@triton.jit
def _load_rows(ptr, i_row, i_f, row_width, there, F: tl.constexpr, ACC: tl.constexpr):
    """Rows `i_row` of a `[rows, row_width]` matrix, `[BLOCK_A, BLOCK_F]`; 0 where `there` is not."""
    inside = there[:, None] & (i_f < F)[None, :]
    return tl.load(ptr + i_row[:, None] * row_width + i_f[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _leaky(b_z, slope):
    return tl.where(b_z > 0, b_z, b_z * slope)


@triton.jit
def _softmax(
    scores, edges, strength_ptr, mask_ptr, i_g, stride_sg, stride_se, stride_mg, stride_me,
    K: tl.constexpr, HAS_STRENGTH: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weights of the slots of each node in branch `i_g`, a tuple of `[BLOCK_A]`; all 0 for a node without edges."""
    logits = ()
    b_max = tl.full(scores[0].shape, float("-inf"), ACC)
    for k in tl.static_range(K):
        there = edges[k] >= 0
        b_s = scores[k]
        if HAS_STRENGTH:
            at = strength_ptr + i_g * stride_sg + edges[k] * stride_se
            b_s = b_s + tl.load(at, mask=there, other=0.0).to(ACC)
        if HAS_MASK:
            there = there & (tl.load(mask_ptr + i_g * stride_mg + edges[k] * stride_me, mask=there, other=0) != 0)
        b_s = tl.where(there, b_s, float("-inf"))
        b_max = tl.maximum(b_max, b_s)
        logits = logits + (b_s,)
    b_max = tl.where(b_max == float("-inf"), tl.zeros_like(b_max), b_max)
    weights = ()
    b_sum = tl.zeros_like(b_max)
    for k in tl.static_range(K):
        b_p = tl.exp(logits[k] - b_max)
        b_sum += b_p
        weights = weights + (b_p,)
    b_inverse = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
    alphas = ()
    for k in tl.static_range(K):
        alphas = alphas + (weights[k] * b_inverse,)
    return alphas


@triton.jit
def _branch_range(starts_ptr, i_v, SHARED: tl.constexpr):
    """First and one past the last of the branches that use feature row `i_v`."""
    if SHARED:
        first = tl.load(starts_ptr + i_v)
        last = tl.load(starts_ptr + i_v + 1)
    else:
        first = i_v
        last = i_v + 1
    return first, last


@triton.jit
def _branch(order_ptr, i, SHARED: tl.constexpr):
    if SHARED:
        i = tl.load(order_ptr + i)
    return i


@triton.jit
def _graph_attention_forward_kernel(
    out_ptr, xl_ptr, xr_ptr, relation_ptr, attention_ptr, gate_ptr, slots_ptr,
    strength_ptr, mask_ptr, order_ptr, starts_ptr,
    A, H, degree, slope, stride_sg, stride_se, stride_mg, stride_me,
    F: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, HAS_STRENGTH: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_v = tl.cast(tl.program_id(0), tl.int64)
    i_h = tl.program_id(1)
    i_a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    i_f = tl.arange(0, BLOCK_F)
    b_slope = tl.full((), slope, ACC)
    width = H * F
    offset = i_v * A * width + i_h * F
    b_xl = _load_rows(xl_ptr + offset, i_a, i_f, width, i_a < A, F, ACC)
    b_attention = tl.load(attention_ptr + i_h * F + i_f, mask=i_f < F, other=0.0).to(ACC)
    scores = ()
    edges = ()
    gates = ()
    neighbours = ()
    for k in tl.static_range(K):
        i_e, i_n, i_r = _load_slot(slots_ptr, k, i_a, A, degree)
        b_xr = _load_rows(xr_ptr + offset, i_n, i_f, width, i_e >= 0, F, ACC)
        b_z = b_xl + b_xr + _load_rows(relation_ptr + i_h * F, i_r, i_f, width, i_e >= 0, F, ACC)
        scores = scores + (tl.sum(_leaky(b_z, b_slope) * b_attention[None, :], axis=1),)
        edges = edges + (i_e,)
        gates = gates + (tl.load(gate_ptr + i_r * H + i_h, mask=i_e >= 0, other=0.0).to(ACC),)
        neighbours = neighbours + (b_xr,)
    inside = (i_a < A)[:, None] & (i_f < F)[None, :]
    first, last = _branch_range(starts_ptr, i_v, SHARED)
    for i in range(first, last):
        i_g = _branch(order_ptr, i, SHARED)
        alphas = _softmax(
            scores, edges, strength_ptr, mask_ptr, i_g, stride_sg, stride_se, stride_mg, stride_me,
            K, HAS_STRENGTH, HAS_MASK, ACC,
        )  # fmt: skip
        b_out = tl.zeros((BLOCK_A, BLOCK_F), ACC)
        for k in tl.static_range(K):
            b_out += (alphas[k] * gates[k])[:, None] * neighbours[k]
        at = out_ptr + i_g * A * width + i_h * F + i_a[:, None] * width + i_f[None, :]
        tl.store(at, b_out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pick(b_values, i_k, k, ACC: tl.constexpr):
    """Column `k` of `[BLOCK_A, K]`."""
    return tl.sum(tl.where((i_k == k)[None, :], b_values, tl.zeros(b_values.shape, ACC)), axis=1)


@triton.jit
def _slot_softmax(b_logits, ACC: tl.constexpr):
    """Softmax over the slots of `[BLOCK_A, K]`; a row of -inf gives zeros."""
    b_max = tl.max(b_logits, axis=1)
    b_max = tl.where(b_max == float("-inf"), tl.zeros(b_max.shape, ACC), b_max)
    b_p = tl.exp(b_logits - b_max[:, None])
    b_sum = tl.sum(b_p, axis=1)
    return b_p * tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)[:, None]


@triton.jit
def _graph_attention_target_kernel(
    d_xl_ptr, d_relation_ptr, d_attention_ptr, d_gate_ptr, d_score_ptr, d_total_ptr, weight_ptr,
    grad_ptr, xl_ptr, xr_ptr, relation_ptr, attention_ptr, gate_ptr, slots_ptr,
    strength_ptr, mask_ptr, order_ptr, starts_ptr,
    V, A, H, E, R, degree, slope, stride_sg, stride_se, stride_mg, stride_me,
    F: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, HAS_STRENGTH: tl.constexpr, HAS_MASK: tl.constexpr,
    RELATIONS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Over incoming edges: gradients of `xl`, of scores `[G, H, E]` and of the parameters (one partial per program).

    What there is per slot lies in `[BLOCK_A, K]` tiles, and neighbours are gathered again where they are needed: with
    everything in registers, as forward, this pass spills.
    """
    i_p = tl.cast(tl.program_id(0), tl.int64)
    i_h = tl.program_id(1)
    i_a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    i_f = tl.arange(0, BLOCK_F)
    i_k = tl.arange(0, K)
    i_rel = tl.arange(0, RELATIONS)
    b_slope = tl.full((), slope, ACC)
    width = H * F
    node = i_a < A
    inside = node[:, None] & (i_f < F)[None, :]
    b_attention = tl.load(attention_ptr + i_h * F + i_f, mask=i_f < F, other=0.0).to(ACC)[None, :]
    in_table = node[:, None] & (i_k < degree)[None, :]
    slots_at = slots_ptr + i_k[None, :] * A + i_a[:, None]
    b_edges = tl.load(slots_at, mask=in_table, other=-1)
    b_relations = tl.load(slots_at + 2 * degree * A, mask=in_table, other=-1)
    there = b_edges >= 0
    b_gates = tl.load(gate_ptr + b_relations * H + i_h, mask=there, other=0.0).to(ACC)
    d_attention = tl.zeros((BLOCK_A, BLOCK_F), ACC)
    d_relation = tl.zeros((RELATIONS, BLOCK_F), ACC)
    d_gates = tl.zeros((BLOCK_A, K), ACC)
    for row in range(i_p, V, tl.num_programs(0)):
        i_v = tl.cast(row, tl.int64)
        offset = i_v * A * width + i_h * F
        b_xl = _load_rows(xl_ptr + offset, i_a, i_f, width, node, F, ACC)
        b_scores = tl.zeros((BLOCK_A, K), ACC)
        for k in range(0, degree):
            i_e, i_n, i_r = _load_slot(slots_ptr, k, i_a, A, degree)
            b_z = b_xl + _load_rows(xr_ptr + offset, i_n, i_f, width, i_e >= 0, F, ACC)
            b_z += _load_rows(relation_ptr + i_h * F, i_r, i_f, width, i_e >= 0, F, ACC)
            b_s = tl.sum(_leaky(b_z, b_slope) * b_attention, axis=1)
            b_scores = tl.where((i_k == k)[None, :], b_s[:, None], b_scores)
        b_totals = tl.zeros((BLOCK_A, K), ACC)
        first, last = _branch_range(starts_ptr, i_v, SHARED)
        for i in range(first, last):
            i_g = tl.cast(_branch(order_ptr, i, SHARED), tl.int64)
            keep = there
            b_logits = b_scores
            if HAS_STRENGTH:
                strength_at = strength_ptr + i_g * stride_sg + b_edges * stride_se
                b_logits = b_logits + tl.load(strength_at, mask=there, other=0.0).to(ACC)
            if HAS_MASK:
                keep = keep & (tl.load(mask_ptr + i_g * stride_mg + b_edges * stride_me, mask=there, other=0) != 0)
            b_alpha = _slot_softmax(tl.where(keep, b_logits, float("-inf")), ACC)
            grad_at = grad_ptr + i_g * A * width + i_h * F + i_a[:, None] * width + i_f[None, :]
            b_g = tl.load(grad_at, mask=inside, other=0.0).to(ACC)
            b_d = tl.zeros((BLOCK_A, K), ACC)
            for k in range(0, degree):
                i_e, i_n, i_r = _load_slot(slots_ptr, k, i_a, A, degree)
                b_xr = _load_rows(xr_ptr + offset, i_n, i_f, width, i_e >= 0, F, ACC)
                b_d = tl.where((i_k == k)[None, :], tl.sum(b_g * b_xr, axis=1)[:, None], b_d)
            b_d = b_d * b_alpha
            b_weight = b_alpha * b_gates
            b_ds = b_d * b_gates
            b_ds = b_ds - b_alpha * tl.sum(b_ds, axis=1)[:, None]
            edge_at = (i_g * H + i_h) * E + b_edges
            tl.store(d_score_ptr + edge_at, b_ds, mask=there)
            tl.store(weight_ptr + edge_at, b_weight, mask=there)
            b_totals += b_ds
            d_gates += b_d
        if SHARED:
            tl.store(d_total_ptr + (i_v * H + i_h) * E + b_edges, b_totals, mask=there)
        d_xl = tl.zeros((BLOCK_A, BLOCK_F), ACC)
        for k in range(0, degree):
            i_e, i_n, i_r = _load_slot(slots_ptr, k, i_a, A, degree)
            b_z = b_xl + _load_rows(xr_ptr + offset, i_n, i_f, width, i_e >= 0, F, ACC)
            b_z += _load_rows(relation_ptr + i_h * F, i_r, i_f, width, i_e >= 0, F, ACC)
            b_t = _pick(b_totals, i_k, k, ACC)[:, None]
            d_attention += b_t * _leaky(b_z, b_slope)
            b_dz = b_t * tl.where(b_z > 0, b_attention, b_attention * b_slope)
            d_xl += b_dz
            # The rows of each relation summed by a product; nothing is lost in tf32x3, because one operand is 0 or 1.
            of_relation = (i_rel[:, None] == i_r[None, :]).to(ACC)
            d_relation += tl.dot(of_relation, b_dz, input_precision=PRECISION, out_dtype=ACC)
        d_xl_at = d_xl_ptr + offset + i_a[:, None] * width + i_f[None, :]
        tl.store(d_xl_at, d_xl.to(d_xl_ptr.dtype.element_ty), mask=inside)
    i_part = i_p * tl.num_programs(2) + tl.program_id(2)
    tl.store(d_attention_ptr + i_part * width + i_h * F + i_f, tl.sum(d_attention, axis=0), mask=i_f < F)
    d_relation_at = d_relation_ptr + i_part * R * width + i_h * F + i_rel[:, None] * width + i_f[None, :]
    tl.store(d_relation_at, d_relation, mask=(i_rel < R)[:, None] & (i_f < F)[None, :])
    for r in range(0, R):
        b_of = tl.where(b_relations == r, d_gates, tl.zeros((BLOCK_A, K), ACC))
        tl.store(d_gate_ptr + i_part * R * H + r * H + i_h, tl.sum(tl.sum(b_of, axis=1), axis=0))


@triton.jit
def _graph_attention_source_kernel(
    d_xr_ptr, d_total_ptr, weight_ptr, grad_ptr, xl_ptr, xr_ptr, relation_ptr, attention_ptr, slots_ptr,
    order_ptr, starts_ptr,
    A, H, E, degree, slope,
    F: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Over outgoing edges: the gradient of `xr`, from the weights and score gradients of the first pass."""
    i_v = tl.cast(tl.program_id(0), tl.int64)
    i_h = tl.program_id(1)
    i_a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    i_f = tl.arange(0, BLOCK_F)
    b_slope = tl.full((), slope, ACC)
    width = H * F
    offset = i_v * A * width + i_h * F
    b_xr = _load_rows(xr_ptr + offset, i_a, i_f, width, i_a < A, F, ACC)
    b_attention = tl.load(attention_ptr + i_h * F + i_f, mask=i_f < F, other=0.0).to(ACC)[None, :]
    b_acc = tl.zeros((BLOCK_A, BLOCK_F), ACC)
    for k in range(0, degree):
        i_e, i_n, i_r = _load_slot(slots_ptr, k, i_a, A, degree)
        b_z = b_xr + _load_rows(xl_ptr + offset, i_n, i_f, width, i_e >= 0, F, ACC)
        b_z += _load_rows(relation_ptr + i_h * F, i_r, i_f, width, i_e >= 0, F, ACC)
        b_ds = tl.load(d_total_ptr + (i_v * H + i_h) * E + i_e, mask=i_e >= 0, other=0.0).to(ACC)
        b_acc += b_ds[:, None] * tl.where(b_z > 0, b_attention, b_attention * b_slope)
    first, last = _branch_range(starts_ptr, i_v, SHARED)
    for i in range(first, last):
        i_g = tl.cast(_branch(order_ptr, i, SHARED), tl.int64)
        for k in range(0, degree):
            i_e, i_n, i_r = _load_slot(slots_ptr, k, i_a, A, degree)
            b_w = tl.load(weight_ptr + (i_g * H + i_h) * E + i_e, mask=i_e >= 0, other=0.0).to(ACC)
            b_g = _load_rows(grad_ptr + i_g * A * width + i_h * F, i_n, i_f, width, i_e >= 0, F, ACC)
            b_acc += b_w[:, None] * b_g
    at = d_xr_ptr + offset + i_a[:, None] * width + i_f[None, :]
    tl.store(at, b_acc.to(d_xr_ptr.dtype.element_ty), mask=(i_a < A)[:, None] & (i_f < F)[None, :])


def forward(
    out: Tensor,
    xl: Tensor,
    xr: Tensor,
    relation_embedding: Tensor,
    attention: Tensor,
    gate: Tensor,
    incoming: Tensor,
    branches: Branches,
    slope: float,
) -> None:
    """Fill `out` `[G, A, H, F]`; `incoming` are the slots `[3, K, A]` of each node's incoming edges."""
    rows, nodes, heads, features = xl.shape
    tile_ = tile("graph_attention_forward", {"features": features, "degree": incoming.shape[1]})
    launch(
        _graph_attention_forward_kernel,
        (rows, heads, triton.cdiv(nodes, tile_.block)),
        out,
        *_contiguous(xl, xr, relation_embedding, attention, gate, incoming),
        *branches.pointers(),
        nodes,
        heads,
        incoming.shape[1],
        slope,
        *branches.strides(),
        device=xl.device,
        tile=tile_,
        **branches.flags(),
        **_sizes(tile_, features),
        ACC=numbers(xl, xr, relation_embedding, attention, gate, branches.strength).acc,
    )


def backward(
    outputs: GraphGradients,
    grad: Tensor,
    xl: Tensor,
    xr: Tensor,
    relation_embedding: Tensor,
    attention: Tensor,
    gate: Tensor,
    incoming: Tensor,
    outgoing: Tensor,
    branches: Branches,
    slope: float,
) -> None:
    """Fill `outputs` from `grad` `[G, A, H, F]`; the parameters' gradients get one partial sum per program."""
    rows, nodes, heads, features = xl.shape
    relations = relation_embedding.shape[0]
    num_edges = outputs.d_score.shape[2]
    types = numbers(xl, xr, relation_embedding, attention, gate, branches.strength)
    grad, xl, xr, relation_embedding, attention, gate, incoming, outgoing = _contiguous(
        grad, xl, xr, relation_embedding, attention, gate, incoming, outgoing
    )
    tile_ = tile("graph_attention_target", {"features": features, "degree": incoming.shape[1]})
    launch(
        _graph_attention_target_kernel,
        (outputs.d_attention.shape[0], heads, triton.cdiv(nodes, tile_.block)),
        *outputs.of_targets(),
        *(grad, xl, xr, relation_embedding, attention, gate, incoming),
        *branches.pointers(),
        *(rows, nodes, heads, num_edges, relations, incoming.shape[1], slope),
        *branches.strides(),
        device=xl.device,
        tile=tile_,
        **branches.flags(),
        **_sizes(tile_, features),
        RELATIONS=16,
        ACC=types.acc,
        PRECISION=_sum_precision(xl.dtype, xr.dtype),
    )
    tile_ = tile("graph_attention_source", {"features": features})
    launch(
        _graph_attention_source_kernel,
        (rows, heads, triton.cdiv(nodes, tile_.block)),
        *(outputs.d_xr, outputs.d_total, outputs.weight),
        *(grad, xl, xr, relation_embedding, attention, outgoing, branches.order, branches.starts),
        *(nodes, heads, num_edges, outgoing.shape[1], slope),
        device=xl.device,
        tile=tile_,
        SHARED=branches.order is not None,
        F=features,
        BLOCK_A=tile_.block,
        BLOCK_F=tile_.size["features"],
        ACC=types.acc,
    )


def _sum_precision(*dtypes: torch.dtype) -> str:
    """How a relation's rows are multiplied by 0 or 1: tf32 holds more than features of low precision do."""
    if INTERPRETING:
        return "ieee"
    return "tf32x3" if torch.float32 in dtypes else "tf32"


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _sizes(tile_: Tile, features: int) -> dict[str, int]:
    return {"F": features, "K": tile_.size["degree"], "BLOCK_A": tile_.block, "BLOCK_F": tile_.size["features"]}
