"""The layouts that the products read: panels of 32 output columns, inputs side by side that one
instruction multiplies: pairs of bf16, quads of 8-bit codes, quads of two 4-bit codes a byte.

Pure functions of tensors: packing at load and packing in the optimizer give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchweave_ray.kernels.quantization import (
    GROUP,
    Format,
    QuantizedFormat,
    QuantizedLinear,
    dequantize,
)
from torchweave_ray.kernels.structs import PANEL

_HALF = PANEL // 2
LAYOUT = f"bf16-panels-{PANEL}"
"""Names the bytes that `pack_linear` gives, for files that hold them. All instruction sets read the
same; a change of the bytes is a new name."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [n, k], zero-padded to whole panels and pairs (bf16) or groups of 32 inputs."""

    data: Tensor
    """`packed_shape`: bf16 [ceil(n / 32), ceil(k / 2), 32, 2], or uint8 codes, K being k padded to
    groups: int8 [panels, K / 4, 32, 4], int4 [panels, K / 8, 32, 4] (byte j of a column holds input
    8 i + j in its low nibble, 8 i + 4 + j in its high one)."""
    n: int
    k: int
    gated: bool = False
    """Panels hold 16 gate columns and the 16 up columns that they multiply. n counts both."""
    format: Format = "bf16"
    scales: Tensor | None = None
    """`scales_shape`: int8 [panels, 32] fp32; int8-group32 [panels, groups, 32] fp16; int4-group32
    [panels, groups, 2, 32] fp16, scales before minimums."""

    num_experts: int = 1
    """Weights below each other, n rows in all, each in panels of its own."""

    @property
    def num_outputs(self) -> int:
        return self.n // 2 if self.gated else self.n


def packed_shape(
    n: int, k: int, gated: bool = False, format: Format = "bf16", num_experts: int = 1
) -> tuple[int, int, int, int]:
    """Of the packed data of a weight [n, k]."""
    panels, groups = _num_panels(n, gated, num_experts), -(-k // GROUP)
    if format == "bf16":
        return (panels, -(-k // 2), PANEL, 2)
    return (panels, groups * (4 if format == "int4-group32" else 8), PANEL, 4)


def scales_shape(
    n: int, k: int, gated: bool, format: QuantizedFormat, num_experts: int = 1
) -> tuple[int, ...]:
    """Of the packed scales (and minimums) of a weight [n, k]."""
    panels, groups = _num_panels(n, gated, num_experts), -(-k // GROUP)
    if format == "int8":
        return (panels, PANEL)
    return (panels, groups, PANEL) if format == "int8-group32" else (panels, groups, 2, PANEL)


def pack_linear(
    weight: Tensor | QuantizedLinear, gated: bool = False, num_experts: int = 1
) -> PackedLinear:
    """Pack weight [n, k], a tensor as bf16; `gated`: its first half of rows are gates, the second
    their ups, of each expert where there are several."""
    if isinstance(weight, QuantizedLinear):
        return _pack_quantized(weight, gated, num_experts)
    n, k = weight.shape
    rows = _panel_rows(weight.bfloat16(), gated, -(-k // 2) * 2, num_experts)
    data = _transpose(rows.view(torch.int32)).view(torch.bfloat16)  # a pair moves as one int32
    shape = packed_shape(n, k, gated, num_experts=num_experts)
    return PackedLinear(data.view(shape), n, k, gated, num_experts=num_experts)


def unpack_linear(packed: PackedLinear) -> Tensor:
    """The weight [n, k] again: bf16, or fp32 of a quantised one."""
    if packed.format != "bf16":
        return dequantize(unpack_quantized(packed))
    return _unpanel(packed.data.transpose(1, 2).flatten(2), packed)[:, : packed.k].contiguous()


def unpack_quantized(packed: PackedLinear) -> QuantizedLinear:
    """What `pack_linear` was given."""
    format, scales = packed.format, packed.scales
    assert format != "bf16"
    assert scales is not None
    quads = packed.data.transpose(1, 2)  # [panels, 32, quads, 4]
    if format == "int4-group32":
        quads = torch.stack((quads & 15, quads >> 4), dim=3)
    codes = _unpanel(quads.flatten(2), packed)[:, : packed.k].contiguous()
    if format == "int8":
        return QuantizedLinear(format, codes, _unpanel(scales[..., None], packed)[:, 0].clone())
    if format == "int8-group32":
        return QuantizedLinear(format, codes, _unpanel(scales.transpose(1, 2), packed))
    both = [_unpanel(scales[:, :, i].transpose(1, 2), packed) for i in range(2)]
    return QuantizedLinear(format, codes, *both)


def pack_bias(bias: Tensor, gated: bool = False) -> Tensor:
    """fp32, in the order of the packed columns, zero-padded to whole panels."""
    return _panel_rows(bias.float()[:, None], gated, 1).flatten()


def pack_norm(weight: Tensor, offset: float = 0.0) -> Tensor:
    """weight + offset in fp32, zero-padded to whole panels."""
    padded = torch.zeros(-(-weight.shape[0] // PANEL) * PANEL)
    padded[: weight.shape[0]] = weight.float() + offset
    return padded


def _pack_quantized(weight: QuantizedLinear, gated: bool, num_experts: int) -> PackedLinear:
    n, k, groups = weight.n, weight.k, -(-weight.k // GROUP)
    codes = _panel_rows(weight.codes, gated, groups * GROUP, num_experts)
    if weight.format == "int4-group32":
        low, high = codes.view(len(codes), PANEL, -1, 2, 4).unbind(dim=3)
        codes = (low | high << 4).flatten(2)
    quads = _transpose(codes.contiguous().view(torch.int32)).view(torch.uint8)
    parts = [weight.scales] if weight.mins is None else [weight.scales, weight.mins]
    columns = 1 if weight.format == "int8" else groups
    packed = [
        _panel_rows(p.view(n, columns), gated, columns, num_experts).transpose(1, 2) for p in parts
    ]
    scales = torch.stack(packed, dim=2).view(scales_shape(n, k, gated, weight.format, num_experts))
    data = quads.view(packed_shape(n, k, gated, weight.format, num_experts))
    return PackedLinear(data, n, k, gated, weight.format, scales, num_experts)


def _num_panels(n: int, gated: bool, num_experts: int = 1) -> int:
    each = n // num_experts
    return num_experts * (-(-(each // 2) // _HALF) if gated else -(-each // PANEL))


def _panel_rows(rows: Tensor, gated: bool, columns: int, num_experts: int = 1) -> Tensor:
    """[n, k] -> [panels, 32, columns], zero-padded; of gated rows 16 of the first half and their
    16 of the second make a panel."""
    if num_experts > 1:
        return torch.cat([_panel_rows(part, gated, columns) for part in rows.chunk(num_experts)])
    n, k = rows.shape
    panels = _num_panels(n, gated)
    if not gated:
        padded = rows.new_zeros(panels * PANEL, columns)
        padded[:n, :k] = rows
        return padded.view(panels, PANEL, columns)
    halves = rows.new_zeros(2, panels * _HALF, columns)
    halves[0, : n // 2, :k], halves[1, : n // 2, :k] = rows[: n // 2], rows[n // 2 :]
    return halves.view(2, panels, _HALF, columns).transpose(0, 1).reshape(panels, PANEL, columns)


def _unpanel(rows: Tensor, packed: PackedLinear) -> Tensor:
    """[panels, 32, columns] -> [n, columns]"""
    if packed.num_experts > 1:
        one = replace(packed, n=packed.n // packed.num_experts, num_experts=1)
        return torch.cat([_unpanel(part, one) for part in rows.chunk(packed.num_experts)])
    panels, _, columns = rows.shape
    if not packed.gated:
        return rows.reshape(-1, columns)[: packed.n].contiguous()
    halves = rows.reshape(panels, 2, _HALF, columns).transpose(0, 1).reshape(2, -1, columns)
    return halves[:, : packed.n // 2].reshape(packed.n, columns)


def _transpose(rows: Tensor) -> Tensor:
    """[panels, 32, inputs] -> [panels, inputs, 32], contiguous."""
    return rows.transpose(1, 2).contiguous()
