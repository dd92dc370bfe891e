"""The codes of a GGUF's quantised blocks as our own formats hold them, without a rounding.

Blocks of 32 inputs (ggml-common.h): Q8_0 is a half scale and 32 signed bytes, Q4_0 a half scale and
16 bytes of two codes (w = (code - 8) * scale), Q4_1 a half scale, a half minimum and the same.
Knows no names and no order of rows.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from torchweave_ray.kernels.quantization import GROUP, ZERO, QuantizedLinear

_TYPES = gguf.GGMLQuantizationType
_HALF = 2
"""Bytes of a half float."""


def read_codes(
    data: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType
) -> QuantizedLinear | None:
    """`data` [n, bytes of a row]. None: a type that no format of ours holds exactly."""
    if kind not in (_TYPES.Q8_0, _TYPES.Q4_0, _TYPES.Q4_1) or data.ndim != 2:
        return None
    n = data.shape[0]
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.from_numpy(np.array(data)).view(n, -1, block_bytes)
    scales = _halves(blocks, 0)
    if kind == _TYPES.Q8_0:
        codes = blocks[..., _HALF:] ^ ZERO  # -128..127 as 0..255
        return QuantizedLinear("int8-group32", codes.flatten(1), scales)
    if kind == _TYPES.Q4_1:
        mins, packed = _halves(blocks, _HALF), blocks[..., 2 * _HALF :]
    else:
        mins, packed = -8 * scales, blocks[..., _HALF:]
        if not mins.isfinite().all():
            return None  # scales that large have no such minimum in half precision
    codes = torch.cat((packed & 15, packed >> 4), dim=2)
    assert codes.shape[2] == GROUP
    return QuantizedLinear("int4-group32", codes.flatten(1), scales, mins)


def _halves(blocks: Tensor, offset: int) -> Tensor:
    """The half float at this byte of each block, [n, blocks]."""
    taken = blocks[..., offset : offset + _HALF].contiguous()
    return taken.view(torch.float16)[..., 0]
