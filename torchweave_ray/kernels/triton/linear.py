"""Products with weights [n, k] as they are stored: bf16 or fp32, fp8, int8 codes, int4 codes.

No split over k, and tiles whose size does not depend on the number of rows where asked: then a
row's bits do not depend on its batch. Scales are applied to sums, or to groups of 32 inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
"""Both with one scale an output."""
GROUP_INT8 = tl.constexpr(3)
GROUP_INT4 = tl.constexpr(4)
GROUP = tl.constexpr(32)
TO_BIAS = tl.constexpr(2.0**120)
"""From the exponent's bias of e4m3, 7, to that of fp32."""


@triton.jit
def load_weight(
    weight, scales, mins, columns, inputs, mask, k, FORMAT: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of the weight in the dtype that is multiplied; sums' scales left out."""
    tile = tl.load(weight + columns[:, None] * k + inputs[None, :], mask=mask, other=0)
    if FORMAT >= GROUP_INT8:
        groups = columns[:, None] * tl.cdiv(k, GROUP) + (inputs // GROUP)[None, :]
        scale = tl.load(scales + groups, mask=mask, other=0.0).to(tl.float32)
        if FORMAT == GROUP_INT4:
            value = tile.to(tl.float32) * scale
            value += tl.load(mins + groups, mask=mask, other=0.0).to(tl.float32)
        else:
            value = (tile.to(tl.float32) - 128.0) * scale
        return tl.where(mask, value, 0.0).to(DTYPE)
    if FORMAT == INT8:
        return tl.where(mask, tile.to(tl.float32) - 128.0, 0.0).to(DTYPE)
    if FORMAT == FP8:  # by its bits: not every GPU knows the type
        bits = tile.to(tl.int32)
        moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return (moved.to(tl.float32, bitcast=True) * TO_BIAS).to(DTYPE)
    return tile.to(DTYPE)


@triton.jit(do_not_specialize=["m"])
def linear(
    out, x, weight, scales, mins, bias, m, n, k, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, column blocks): out [m, n] = x [m, k] @ weight.T + bias, sums in fp32."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_row, is_column = rows < m, columns < n
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inputs = start + tl.arange(0, BLOCK_K)
        is_input = (inputs < k)[None, :]
        a = tl.load(x_rows + inputs[None, :], mask=is_row[:, None] & is_input, other=0.0)
        b = load_weight(weight, scales, mins, columns, inputs, is_column[:, None] & is_input, k,
                        FORMAT, a.dtype)  # fmt: skip
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if FORMAT == INT8 or FORMAT == FP8:  # noqa: SIM109
        acc *= tl.load(scales + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    cells = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out + cells, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
