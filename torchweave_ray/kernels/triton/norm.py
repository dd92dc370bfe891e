"""RMSNorm of rows, alone or with the add to the residual stream before or behind it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    out, hidden, x, weight, row_stride, num_columns, eps, offset,
    BLOCK: tl.constexpr, ADDS_BEFORE: tl.constexpr, ADDS_BEHIND: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): norm(x) * (weight + offset), in fp32, each step rounded as the twin rounds it.

    ADDS_BEFORE: hidden += x, out = norm(hidden). ADDS_BEHIND: hidden += norm(x), no `out`.
    hidden and out have rows of num_columns, x of row_stride.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < num_columns
    cells = row * num_columns + columns
    value = tl.load(x + row * row_stride + columns, mask=is_column, other=0.0)
    dtype = value.dtype
    if ADDS_BEFORE:
        value = value.to(tl.float32) + tl.load(hidden + cells, mask=is_column, other=0.0).to(
            tl.float32
        )
        value = value.to(dtype)
        tl.store(hidden + cells, value, mask=is_column)
    value = value.to(tl.float32)
    mean = tl.sum(value * value, 0) / num_columns
    scale = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32) + offset
    normed = (value * tl.rsqrt(mean + eps) * scale).to(dtype)
    if ADDS_BEHIND:
        held = tl.load(hidden + cells, mask=is_column, other=0.0).to(tl.float32)
        tl.store(hidden + cells, (held + normed.to(tl.float32)).to(dtype), mask=is_column)
    else:
        tl.store(out + cells, normed, mask=is_column)
