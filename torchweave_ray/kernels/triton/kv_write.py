"""A step's keys and values into their slots of the paged cache: as they are, or as int8 codes."""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away again it rounds a small float32 half to even, as torch does."""


@triton.jit
def store_row(cache, scales, x, row, dims, HEAD_DIM: tl.constexpr, IS_INT8: tl.constexpr):
    """x [DIM_PAD] float32 into one row of a cache [rows, HEAD_DIM], quantised as `quantize_kv`."""
    is_dim = dims < HEAD_DIM
    if IS_INT8:
        x = tl.where(is_dim, x, 0.0)
        largest = tl.max(tl.abs(x), 0)
        spoilt = tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1), 0) > 0
        scale = tl.where(spoilt, float("nan"), tl.div_rn(largest, 127.0))
        divisor = tl.where(scale > 0.0, scale, 1.0)
        codes = (tl.div_rn(tl.where(spoilt, 0.0, x), divisor) + ROUNDER) - ROUNDER
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
        tl.store(scales + row, scale)
        tl.store(cache + row * HEAD_DIM + dims, codes.to(tl.int8), mask=is_dim)
    else:
        tl.store(cache + row * HEAD_DIM + dims, x.to(cache.dtype.element_ty), mask=is_dim)


@triton.jit
def write_kv(
    keys, values, key_cache, value_cache, key_scales, value_scales, slot_mapping,
    key_stride, key_head_stride, value_stride, value_head_stride,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, KV heads). A token whose slot is negative is padding: nothing is written."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    row = (slot // BLOCK_SIZE * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    dims = tl.arange(0, DIM_PAD)
    is_dim = dims < HEAD_DIM
    key = tl.load(keys + token * key_stride + head * key_head_stride + dims, mask=is_dim, other=0.0)
    store_row(key_cache, key_scales, key.to(tl.float32), row, dims, HEAD_DIM, IS_INT8)
    value = tl.load(values + token * value_stride + head * value_head_stride + dims, mask=is_dim,
                    other=0.0)  # fmt: skip
    store_row(value_cache, value_scales, value.to(tl.float32), row, dims, HEAD_DIM, IS_INT8)
