"""The gated activation of an MLP: act(gate) * up."""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def gated(out, x, row_stride, size, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, blocks): x [rows, 2 * size], gates before ups, to out [rows, size]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < size
    gate = tl.load(x + row * row_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(x + row * row_stride + size + columns, mask=is_column, other=0.0)
    if IS_GELU:  # tanh(y) = 2 sigmoid(2 y) - 1
        inner = SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
        turned = gate * tl.sigmoid(2.0 * inner)
    else:
        turned = gate * tl.sigmoid(gate)
    turned = turned.to(up.dtype).to(tl.float32)  # as the twin rounds
    tl.store(out + row * size + columns, (turned * up.to(tl.float32)).to(up.dtype), mask=is_column)
