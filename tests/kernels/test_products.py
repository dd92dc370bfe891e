"""Packing, products, norm and embedding against their torch twins; the same bits in every batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from torchweave_ray.kernels import twin
from torchweave_ray.kernels.ops import NativeOps
from torchweave_ray.kernels.packing import PackedLinear, pack_linear, packed_shape, unpack_linear

SHAPES = [(1, 1), (31, 7), (32, 64), (33, 65), (100, 576), (260, 127)]
"""(n, k): less than a panel, less than a group, odd k, tails."""
NUM_ROWS = [0, 1, 2, 3, 11, 12, 13, 25, 61]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def x_of(m: int, k: int) -> Tensor:
    return randn(m, k, seed=m, dtype=torch.bfloat16)


def _weight(n: int, k: int) -> Tensor:
    return randn(n, k, seed=n, dtype=torch.bfloat16) / k**0.5


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("gated", [False, True])
def test_unpacking_gives_the_weight_back(n: int, k: int, gated: bool) -> None:
    n = 2 * n if gated else n
    weight = _weight(n, k)
    packed = pack_linear(weight, gated)
    assert packed.data.shape == packed_shape(n, k, gated)
    assert packed.data.shape[2:] == (32, 2)
    assert torch.equal(unpack_linear(packed), weight)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_equal_the_twin(ops: NativeOps, n: int, k: int) -> None:
    packed, bias = pack_linear(_weight(n, k)), randn(n)
    for m in NUM_ROWS:
        x = x_of(m, k)
        for options in ({}, {"bias": bias}, {"dtype": torch.bfloat16}):
            given: dict[str, Any] = dict(options)
            expected = twin.linear(x, packed, **given)
            rounding = 1e-2 if "dtype" in given else 1e-4
            torch.testing.assert_close(
                ops.linear(x, packed, **given), expected, rtol=rounding, atol=1e-4
            )
        residual, copy = randn(m, n, seed=1), randn(m, n, seed=1)
        added = ops.linear(x, packed, bias, residual=residual)
        assert added is residual
        torch.testing.assert_close(
            added, twin.linear(x, packed, bias, residual=copy), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_gated_products_equal_the_twin(ops: NativeOps, n: int, k: int, activation: Any) -> None:
    packed, bias = pack_linear(_weight(2 * n, k) * 4, gated=True), randn(2 * n)
    for m in NUM_ROWS:
        given = {"bias": bias, "activation": activation}
        expected = twin.linear(x_of(m, k), packed, **given)
        actual = ops.linear(x_of(m, k), packed, **given)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("k", [64, 577])
def test_a_rows_bits_depend_on_nothing_but_the_row(
    ops: NativeOps, one_thread: NativeOps, k: int
) -> None:
    assert_rows_alone(ops, one_thread, pack_linear(_weight(96, k)), x_of(500, k))


def assert_rows_alone(
    ops: NativeOps, one_thread: NativeOps, packed: PackedLinear, x: Tensor
) -> None:
    together = ops.linear(x, packed)
    assert torch.equal(one_thread.linear(x, packed), together)
    for m in range(1, 33):
        start = random.Random(m).randrange(400)
        rows = slice(start, start + m)
        assert torch.equal(ops.linear(x[rows], packed), together[rows])
        assert torch.equal(one_thread.linear(x[rows], packed), together[rows])


def test_a_row_of_nan_stays_by_itself(ops: NativeOps) -> None:
    packed, x = pack_linear(_weight(64, 64)), x_of(5, 64)
    x[2, 3] = torch.nan
    out = ops.linear(x, packed)
    assert out.isnan().any(dim=1).tolist() == [False, False, True, False, False]
    gated = ops.linear(x, pack_linear(_weight(64, 64), gated=True), activation="silu")
    assert gated.isnan().any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("n", [1, 15, 64, 100, 577])
def test_norms_equal_the_twin(ops: NativeOps, n: int) -> None:
    for m in (0, 1, 3, 40):
        for offset in (0.0, 1.0):
            x, weight = randn(m, n) * 30, randn(n, seed=2, dtype=torch.bfloat16)
            expected = twin.rms_norm(x, weight, 1e-5, offset)
            actual = ops.rms_norm(x, weight, 1e-5, offset)
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("k", [1, 63, 64])
def test_embeddings_equal_the_twin(ops: NativeOps, k: int) -> None:
    table = _weight(300, k)
    ids = torch.tensor([0, 31, 32, 299, 5, 5])
    for given in (table, pack_linear(table)):
        assert torch.equal(ops.embed(ids, given, 1.5), twin.embed(ids, given, 1.5))
        assert ops.embed(ids[:0], given).shape == (0, k)
