"""The Triton kernel of ``attention``: one pass over the keys with a running softmax (FlashAttention-2)."""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catimage_accel.kernels.attention.shape import tuned_shape
from catimage_accel.kernels.dispatch import register_triton_op, wrap_triton
from catimage_accel.kernels.tuning import launch_config

LOG2_E = 1.4426950408889634


@triton.jit
def load_tile(
    ptr, rows, stride, columns, length, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """Rows x columns of a (length, head_dim) matrix; zeros outside it."""
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, (rows[:, None] < length) & (columns[None, :] < HEAD_DIM), 0.0)
    if MASK_ROWS:
        return tl.load(pointers, rows[:, None] < length, 0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, columns[None, :] < HEAD_DIM, 0.0)
    return tl.load(pointers)


@triton.jit
def attention_kernel(
    q_ptr,  # (batch, queries, heads, head_dim), head_dim dense
    k_ptr,  # (batch, keys, heads, head_dim), head_dim dense
    v_ptr,  # (batch, keys, heads, head_dim), head_dim dense
    out_ptr,  # (batch, queries, heads, head_dim), contiguous
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    scale_log2,
    heads,
    queries,
    keys,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # head_dim is covered by columns [0, WIDTH) and
    REST: tl.constexpr,  # [WIDTH, WIDTH + REST); REST is 0 where one block does
    EVEN_KEYS: tl.constexpr,  # keys is a multiple of BLOCK_N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    batch = (program // blocks // heads).to(tl.int64)
    head = ((program // blocks) % heads).to(tl.int64)
    # Positions in the sequence go through 64-bit pointers, so that large tensors do not overflow an offset.
    first = ((program % blocks) * BLOCK_M).to(tl.int64)
    q_ptr += batch * q_batch_stride + head * q_head_stride + first * q_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    out_ptr += ((batch * queries + first) * heads + head) * HEAD_DIM

    rows = tl.arange(0, BLOCK_M)
    queries_left = queries - (program % blocks) * BLOCK_M
    key_rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, WIDTH)
    MASK_COLUMNS: tl.constexpr = WIDTH > HEAD_DIM
    q = load_tile(q_ptr, rows, q_stride, columns, queries_left, HEAD_DIM, True, MASK_COLUMNS)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if REST > 0:
        rest_columns = WIDTH + tl.arange(0, REST)
        MASK_REST: tl.constexpr = WIDTH + REST > HEAD_DIM
        q_rest = load_tile(q_ptr, rows, q_stride, rest_columns, queries_left, HEAD_DIM, True, MASK_REST)
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    for start in range(0, keys, BLOCK_N):
        keys_left = keys - start
        k = load_tile(k_ptr, key_rows, k_stride, columns, keys_left, HEAD_DIM, not EVEN_KEYS, MASK_COLUMNS)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST > 0:
            k_rest = load_tile(k_ptr, key_rows, k_stride, rest_columns, keys_left, HEAD_DIM, not EVEN_KEYS, MASK_REST)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        scores *= scale_log2
        if not EVEN_KEYS:
            scores = tl.where(key_rows[None, :] < keys_left, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row whose scores are all -inf so far must not turn into -inf - -inf.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
        v = load_tile(v_ptr, key_rows, v_stride, columns, keys_left, HEAD_DIM, not EVEN_KEYS, MASK_COLUMNS)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        if REST > 0:
            v_rest = load_tile(v_ptr, key_rows, v_stride, rest_columns, keys_left, HEAD_DIM, not EVEN_KEYS, MASK_REST)
            acc_rest = tl.dot(weights.to(v.dtype), v_rest, acc_rest * fade[:, None], input_precision="ieee")
        k_ptr += BLOCK_N * k_stride
        v_ptr += BLOCK_N * v_stride

    out_pointers = out_ptr + rows[:, None] * (heads * HEAD_DIM)
    in_rows = rows[:, None] < queries_left
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_pointers + columns[None, :], result, in_rows & (columns[None, :] < HEAD_DIM))
    if REST > 0:
        result = (acc_rest / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_pointers + rest_columns[None, :], result, in_rows & (rest_columns[None, :] < HEAD_DIM))


def column_blocks(head_dim: int) -> tuple[int, int]:
    """``(WIDTH, REST)``: two powers of two that cover head_dim with little waste (40 = 32 + 16, not 64).

    A tensor core takes 16 columns at least.
    """
    width = max(16, 1 << (head_dim.bit_length() - 1))
    if head_dim <= width:
        return width, 0
    rest = max(16, triton.next_power_of_2(head_dim - width))
    return (2 * width, 0) if rest == width else (width, rest)


def attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See :func:`catimage_accel.kernels.attention`."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if q.numel() == 0 or keys == 0:
        return q.new_zeros(q.shape)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    width, rest = column_blocks(head_dim)
    config = launch_config("attention", q.device, **tuned_shape(q, k))
    wrap_triton(attention_kernel)[(triton.cdiv(queries, config["BLOCK_M"]) * batch * heads,)](
        q, k, v, out,
        q.stride(0), q.stride(1), q.stride(2),
        k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2),
        scale * LOG2_E, heads, queries, keys,
        HEAD_DIM=head_dim, WIDTH=width, REST=rest, EVEN_KEYS=keys % config["BLOCK_N"] == 0,
        **config,
    )  # fmt: skip
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_op = register_triton_op("attention", attention_op, _fake)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """See :func:`catimage_accel.kernels.attention`; arguments are validated already."""
    out: Tensor = _op(q, k, v, scale)
    return out
