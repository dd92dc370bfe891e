"""Quantised weights row by row: what their codes mean and how they are chosen.

Formats, named by the bits of a code and how many weights share a scale (w is the weight):
int8            w = (code - 128) * scale[row], codes 1..255, scales fp32
int8-group32    w = (code - 128) * scale[row, group of 32 inputs], scales fp16
int4-group32    w = code * scale[row, group] + min[row, group], codes 0..15, both fp16
fp8             w = e4m3 of the code's bits * scale[row], scales fp32; for GPUs
Knows nothing of the order the kernels read (packing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 32
"""Inputs that share a scale, of weights in groups and of activations always."""
ZERO = 128
"""The int8 code of 0."""

FP8 = torch.float8_e4m3fn
_LARGEST_FP8 = 448.0

QuantizedFormat = Literal["int8", "int8-group32", "int4-group32", "fp8"]
Format = Literal["bf16"] | QuantizedFormat


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A weight [n, k], one code a byte."""

    format: QuantizedFormat
    codes: Tensor  # [n, k] uint8
    scales: Tensor  # int8, fp8: [n] fp32; groups: [n, ceil(k / 32)] fp16
    mins: Tensor | None = None  # int4-group32: like scales

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        of_rows = self.format in ("int8", "fp8")
        shape = (n,) if of_rows else (n, -(-k // GROUP))
        dtype = torch.float32 if of_rows else torch.float16
        assert self.codes.dtype == torch.uint8
        assert (self.scales.shape, self.scales.dtype) == (shape, dtype)
        assert (self.mins is not None) == (self.format == "int4-group32")
        assert self.mins is None or (self.mins.shape, self.mins.dtype) == (shape, dtype)

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def rows(self, ids: Tensor) -> QuantizedLinear:
        """Those of `ids` [m]."""
        mins = None if self.mins is None else self.mins[ids]
        return QuantizedLinear(self.format, self.codes[ids], self.scales[ids], mins)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations [m, k], k padded to groups: code * scale. A scale is a group's largest value over
    127, NaN where the group has one or an infinity."""

    codes: Tensor  # [m, K] int8; of a NaN scale: any
    scales: Tensor  # [m, K / 32] fp32
    sums: Tensor  # [m, K / 32] int32: of a group's codes


def quantize(weight: Tensor, format: QuantizedFormat) -> QuantizedLinear:
    """Of a weight [n, k] of any float dtype."""
    if format == "int8":
        return quantize_int8(weight)
    if format == "fp8":
        return quantize_fp8(weight)
    return quantize_int8_group(weight) if format == "int8-group32" else quantize_int4_group(weight)


def quantize_int8(weight: Tensor) -> QuantizedLinear:
    """One scale a row, by its largest weight: clipping that costs more than finer steps gain in
    8 bits."""
    rows = weight.float()
    scales = rows.abs().amax(dim=1) / 127
    codes = _codes(rows, scales[:, None]).clamp_(-127, 127) + ZERO
    return QuantizedLinear("int8", codes.to(torch.uint8), scales)


def quantize_fp8(weight: Tensor) -> QuantizedLinear:
    """One scale a row: its largest weight becomes the largest number of e4m3, 448."""
    rows = weight.float()
    scales = rows.abs().amax(dim=1) / _LARGEST_FP8
    values = torch.where(scales[:, None] == 0, 0.0, rows / scales[:, None])
    codes = values.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(FP8)
    return QuantizedLinear("fp8", codes.view(torch.uint8), scales)


def quantize_int8_group(weight: Tensor) -> QuantizedLinear:
    """One scale for 32 inputs of a row."""
    groups = _groups(weight)
    scales = (groups.abs().amax(dim=2) / 127).half()
    codes = _codes(groups, scales.float()[..., None]).clamp_(-127, 127) + ZERO
    return QuantizedLinear("int8-group32", _rows(codes, weight.shape[1]), scales)


def quantize_int4_group(weight: Tensor) -> QuantizedLinear:
    """One scale and one minimum for 32 inputs of a row."""
    k = weight.shape[1]
    groups = _groups(weight, mode="replicate")  # padding must not widen the last group's range
    mins = groups.amin(dim=2).half()
    offsets = groups - mins.float()[..., None]
    scales = (offsets.amax(dim=2).clamp_(min=0) / 15).half()
    codes = _codes(offsets, scales.float()[..., None]).clamp_(0, 15)
    return QuantizedLinear("int4-group32", _rows(codes, k), scales, mins)


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Of activations [m, k], each group of 32 columns by itself: code = x * (127 / largest) to the
    nearest, ties to even. Values too small for that quotient become 0."""
    groups = _groups(x)
    largest = groups.abs().amax(dim=2)
    scales = torch.where(largest.isfinite(), largest / 127, torch.nan)
    inverse = torch.full_like(largest, 127) / largest  # `127 / largest` would round twice
    factors = torch.where(inverse.isfinite(), inverse, 0.0)
    codes = (groups * factors[..., None]).round().nan_to_num_(0.0)
    sums = codes.sum(dim=2).int()
    return QuantizedRows(codes.to(torch.int8).flatten(1), scales, sums)


def dequantize(weight: QuantizedLinear) -> Tensor:
    """[n, k] fp32."""
    if weight.format == "fp8":
        return weight.codes.view(FP8).float() * weight.scales[:, None]
    codes = weight.codes.float() - (0 if weight.format == "int4-group32" else ZERO)
    values = codes * _every_input(weight.scales, weight.k)
    return values if weight.mins is None else values + _every_input(weight.mins, weight.k)


def concat_rows(weights: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Weights of one format and width below each other, as fused products read them."""
    first = weights[0]
    assert all((w.format, w.k) == (first.format, first.k) for w in weights)
    return QuantizedLinear(
        first.format,
        torch.cat([w.codes for w in weights]),
        torch.cat([w.scales for w in weights]),
        None if first.mins is None else torch.cat([w.mins for w in weights if w.mins is not None]),
    )


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    """Nearest whole numbers of values / scales, ties to even; 0 where the scale is 0."""
    return torch.where(scales == 0, 0.0, values / scales).round()


def _groups(weight: Tensor, mode: Literal["constant", "replicate"] = "constant") -> Tensor:
    """[n, groups, 32] fp32."""
    n, k = weight.shape
    groups = -(-k // GROUP)
    padded = functional.pad(weight.float(), (0, groups * GROUP - k), mode)
    return padded.view(n, groups, GROUP)


def _rows(codes: Tensor, k: int) -> Tensor:
    return codes.to(torch.uint8).flatten(1)[:, :k].contiguous()


def _every_input(scales: Tensor, k: int) -> Tensor:
    """fp32, to multiply [n, k] with."""
    if scales.dim() == 1:
        return scales[:, None]
    return scales.float().repeat_interleave(GROUP, dim=1)[:, :k]
