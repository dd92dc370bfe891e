"""What lies between the product that gives queries, keys and values and the attention over them:
norms of heads, rotation, keys and values into the cache."""

from __future__ import annotations

import triton
import triton.language as tl

from torchweave_ray.kernels.triton.kv_write import store_row


@triton.jit
def load_head(x, weight, dims, eps, offset, HEAD_DIM: tl.constexpr, HAS_NORM: tl.constexpr):
    """One head's row in fp32; normed, and rounded to its own dtype, where it has a norm."""
    is_dim = (dims >= 0) & (dims < HEAD_DIM)
    value = tl.load(x + dims, mask=is_dim, other=0.0)
    dtype = value.dtype
    value = value.to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(value * value, 0) / HEAD_DIM
        scale = tl.load(weight + dims, mask=is_dim, other=0.0).to(tl.float32) + offset
        value = (value * tl.rsqrt(mean + eps) * scale).to(dtype).to(tl.float32)
    return value


@triton.jit
def load_rotated(
    x, weight, cos, sin, dims, eps, offset, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """load_head, its first ROTARY_DIM dimensions turned; sin is negated in the first half."""
    value = load_head(x, weight, dims, eps, offset, HEAD_DIM, HAS_NORM)
    if ROTARY_DIM > 0:
        turns = dims < ROTARY_DIM
        partners = tl.where(turns, (dims + ROTARY_DIM // 2) % ROTARY_DIM, dims)
        partner = load_head(x, weight, partners, eps, offset, HEAD_DIM, HAS_NORM)
        c = tl.load(cos + dims, mask=turns, other=1.0)
        s = tl.load(sin + dims, mask=turns, other=0.0)
        value = value * c + partner * s
    return value


@triton.jit
def rotate_and_write(
    queries, qkv, q_weight, k_weight, cos, sin, key_cache, value_cache, key_scales, value_scales,
    slot_mapping, row_stride, eps, offset,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, heads of queries, keys and values). cos, sin [tokens, ROTARY_DIM] fp32.

    A token whose slot is negative is padding: it gets queries, and nothing is written for it.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, DIM_PAD)
    x = qkv + token * row_stride + head * HEAD_DIM
    cos += token * ROTARY_DIM
    sin += token * ROTARY_DIM
    if head < NUM_HEADS:
        value = load_rotated(x, q_weight, cos, sin, dims, eps, offset, HEAD_DIM, ROTARY_DIM,
                             HAS_Q_NORM)  # fmt: skip
        cells = (token * NUM_HEADS + head) * HEAD_DIM + dims
        tl.store(queries + cells, value.to(queries.dtype.element_ty), mask=dims < HEAD_DIM)
        return
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    row = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    if head < NUM_HEADS + NUM_KV_HEADS:
        value = load_rotated(x, k_weight, cos, sin, dims, eps, offset, HEAD_DIM, ROTARY_DIM,
                             HAS_K_NORM)  # fmt: skip
        value = value.to(qkv.dtype.element_ty).to(tl.float32)
        store_row(key_cache, key_scales, value, row, dims, HEAD_DIM, IS_INT8)
    else:
        value = load_head(x, k_weight, dims, eps, offset, HEAD_DIM, False)
        store_row(value_cache, value_scales, value, row, dims, HEAD_DIM, IS_INT8)
