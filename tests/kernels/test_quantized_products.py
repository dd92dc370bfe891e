"""Products with quantised weights against their torch twins; the same bits in every batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_products import SHAPES, assert_rows_alone, randn, x_of
from torchweave_ray.kernels import twin
from torchweave_ray.kernels.ops import NativeOps
from torchweave_ray.kernels.packing import PackedLinear, pack_linear
from torchweave_ray.kernels.quantization import QuantizedFormat, QuantizedLinear, quantize

FORMATS: tuple[QuantizedFormat, ...] = ("int8", "int8-group32", "int4-group32")
NUM_ROWS = [0, 1, 2, 3, 5, 6, 7, 13, 61]


def _packed(n: int, k: int, format: QuantizedFormat, gated: bool = False) -> PackedLinear:
    return pack_linear(quantize(randn(n, k, seed=n) / k**0.5, format), gated)


def _assert_equal_but_for_rounding(actual: Tensor, expected: Tensor) -> None:
    """Whole-number sums are exact; a few fp32 additions in one order are left."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual - expected).abs().max() <= 4e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_equal_the_twin(ops: NativeOps, n: int, k: int, format: QuantizedFormat) -> None:
    packed, bias = _packed(n, k, format), randn(n)
    for m in NUM_ROWS:
        x = x_of(m, k)
        for given in ({}, {"bias": bias}):
            _assert_equal_but_for_rounding(
                ops.linear(x, packed, **given), twin.linear(x, packed, **given)
            )
        half = ops.linear(x, packed, dtype=torch.bfloat16)
        expected = twin.linear(x, packed, dtype=torch.bfloat16)
        torch.testing.assert_close(half, expected, rtol=1e-2, atol=1e-4)
        residual, copy = randn(m, n, seed=1), randn(m, n, seed=1)
        added = ops.linear(x, packed, bias, residual=residual)
        assert added is residual
        _assert_equal_but_for_rounding(added, twin.linear(x, packed, bias, residual=copy))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_gated_products_equal_the_twin(
    ops: NativeOps, n: int, k: int, activation: Any, format: QuantizedFormat
) -> None:
    packed, bias = _packed(2 * n, k, format, gated=True), randn(2 * n)
    for m in NUM_ROWS:
        expected = twin.linear(x_of(m, k), packed, bias, activation=activation)
        actual = ops.linear(x_of(m, k), packed, bias, activation=activation)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_codes_do_not_overflow(ops: NativeOps, format: QuantizedFormat) -> None:
    """Every product of a long row at its extreme: sums must not saturate in any instruction set."""
    k, top = 1024, 15 if format == "int4-group32" else 255
    codes = torch.full((64, k), top, dtype=torch.uint8)
    codes[1::2] = 0
    shape = (64,) if format == "int8" else (64, k // 32)
    scales = torch.ones(shape, dtype=torch.float32 if format == "int8" else torch.float16)
    mins = torch.zeros_like(scales) if format == "int4-group32" else None
    packed = pack_linear(QuantizedLinear(format, codes, scales, mins))
    x = torch.ones(2, k, dtype=torch.bfloat16)
    x[1] = -1
    assert torch.equal(ops.linear(x, packed), twin.linear(x, packed))


@pytest.mark.parametrize("k", [1, 31, 64, 577])
def test_rows_are_quantized_like_the_twins(ops: NativeOps, k: int) -> None:
    for m in NUM_ROWS:
        x = x_of(m, k) * 100
        if m > 2:
            x[1] = 0
            x[2, k // 2 :] *= 1e-36  # subnormal scales
        actual, expected = ops.quantize(x), twin.quantize(x)
        assert torch.equal(actual.codes, expected.codes)
        assert torch.equal(actual.scales, expected.scales)
        assert torch.equal(actual.sums, expected.sums)


@pytest.mark.parametrize("n", [1, 15, 64, 100, 577])
def test_norms_straight_to_blocks_equal_the_twins(ops: NativeOps, n: int) -> None:
    """But for a last bit of the norm, which may move a code by one."""
    for m in (0, 1, 3, 40):
        x, weight = randn(m, n) * 30, randn(n, seed=2, dtype=torch.bfloat16)
        actual = ops.rms_norm_quantized(x, weight, 1e-5, 1.0)
        expected = twin.rms_norm_quantized(x, weight, 1e-5, 1.0)
        torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-5, atol=0.0)
        moved = (actual.codes.int() - expected.codes.int()).abs()
        assert not m or (moved.max() <= 1 and moved.float().mean() < 0.01)
        sums = actual.codes.view(m, -1, 32).sum(dim=2) if m else actual.sums
        assert torch.equal(actual.sums, sums.int())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [64, 577])
def test_a_rows_bits_depend_on_nothing_but_the_row(
    ops: NativeOps, one_thread: NativeOps, k: int, format: QuantizedFormat
) -> None:
    assert_rows_alone(ops, one_thread, _packed(96, k, format), x_of(500, k))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_of_nan_stays_by_itself(
    ops: NativeOps, format: QuantizedFormat, poison: float
) -> None:
    x, alone = x_of(5, 64), [False, False, True, False, False]
    x[2, 3] = poison
    out = ops.linear(x, _packed(64, 64, format))
    assert out.isnan().all(dim=1).tolist() == alone
    assert out.isnan().any(dim=1).tolist() == alone
    assert twin.linear(x, _packed(64, 64, format)).isnan().any(dim=1).tolist() == alone
    gated = ops.linear(x, _packed(64, 64, format, gated=True), activation="silu")
    assert gated.isnan().any(dim=1).tolist() == alone


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [1, 63, 64])
def test_embeddings_equal_the_twin(ops: NativeOps, k: int, format: QuantizedFormat) -> None:
    table, ids = _packed(300, k, format), torch.tensor([0, 31, 32, 299, 5, 5])
    assert torch.equal(ops.embed(ids, table, 1.5), twin.embed(ids, table, 1.5))
    assert ops.embed(ids[:0], table).shape == (0, k)
