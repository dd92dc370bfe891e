"""Quantised weights: what rounding may lose, and that packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchweave_ray.kernels.packing import (
    pack_linear,
    packed_shape,
    scales_shape,
    unpack_linear,
    unpack_quantized,
)
from torchweave_ray.kernels.quantization import (
    QuantizedFormat,
    QuantizedLinear,
    concat_rows,
    dequantize,
    quantize,
)

FORMATS: tuple[QuantizedFormat, ...] = ("int8", "int8-group32", "int4-group32")
SHAPES = [(2, 1), (32, 64), (34, 65), (100, 576), (260, 127)]


def _weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def _step(quantized: QuantizedLinear) -> Tensor:
    """The gap between neighbouring codes, for every weight."""
    scales = quantized.scales.float()
    if scales.dim() == 1:
        return scales[:, None].expand(-1, quantized.k)
    return scales.repeat_interleave(32, dim=1)[:, : quantized.k]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weights_are_rounded_to_the_nearest_code(format: QuantizedFormat, n: int, k: int) -> None:
    weight = _weight(n, k)
    quantized = quantize(weight, format)
    error = (dequantize(quantized) - weight).abs()
    # Half a step, and what rounding the group's scale and minimum to fp16 takes from its range.
    assert (error <= _step(quantized) * 0.5 + weight.abs().max() * 2**-10).all()
    if format == "int4-group32":
        assert quantized.codes.max() <= 15
    else:
        assert quantized.codes.min() >= 1


@pytest.mark.parametrize("format", FORMATS)
def test_zero_and_equal_weights_are_exact(format: QuantizedFormat) -> None:
    assert torch.equal(dequantize(quantize(torch.zeros(3, 40), format)), torch.zeros(3, 40))
    equal = torch.full((3, 40), -1.5)
    torch.testing.assert_close(dequantize(quantize(equal, format)), equal, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpacking_gives_the_codes_back(
    format: QuantizedFormat, n: int, k: int, gated: bool
) -> None:
    quantized = quantize(_weight(n, k), format)
    packed = pack_linear(quantized, gated)
    assert packed.scales is not None
    assert packed.data.shape == packed_shape(n, k, gated, format)
    assert packed.scales.shape == scales_shape(n, k, gated, format)
    assert packed.data.is_contiguous()
    assert packed.scales.is_contiguous()
    back = unpack_quantized(packed)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert (back.mins is None) == (quantized.mins is None)
    if back.mins is not None and quantized.mins is not None:
        assert torch.equal(back.mins, quantized.mins)
    assert torch.equal(unpack_linear(packed), dequantize(quantized))


def test_where_a_4_bit_code_lies() -> None:
    """Input 8 i + j of column c: byte j of [panel, i, c], low nibble; 8 i + 4 + j: high nibble."""
    codes = torch.zeros(40, 64, dtype=torch.uint8)
    codes[35, 13] = 9  # i = 1, high nibble, j = 1
    codes[35, 9] = 6  # i = 1, low nibble, j = 1
    scales = torch.arange(80).view(40, 2).half()
    packed = pack_linear(QuantizedLinear("int4-group32", codes, scales, -scales))
    assert packed.scales is not None
    assert packed.data.nonzero().tolist() == [[1, 1, 3, 1]]
    assert packed.data[1, 1, 3, 1] == 0x96
    assert packed.scales[1, 1, :, 3].tolist() == [71.0, -71.0]


@pytest.mark.parametrize("format", FORMATS)
def test_rows_below_each_other(format: QuantizedFormat) -> None:
    parts = [quantize(_weight(n, 70, seed=n), format) for n in (3, 33)]
    expected = torch.cat([dequantize(part) for part in parts])
    assert torch.equal(dequantize(concat_rows(parts)), expected)
