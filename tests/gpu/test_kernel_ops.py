"""Each Triton op beside its torch twin, in fp32 and bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.attention_case import MIXED, Case
from tests.parity.paged import on_device
from torchweave_ray.attention.base import AttentionShape, HeadNorms, LayerKV, quantize_kv
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.kernels.quantization import QuantizedFormat, QuantizedLinear, quantize
from torchweave_ray.models.ops import TorchOps, rotation_of

pytest.importorskip("triton", reason="triton, the language of the kernels, is not installed")
from torchweave_ray.kernels.triton.ops import TritonOps

BF16 = torch.bfloat16
OURS, THEIRS = TritonOps(), TorchOps(TorchPagedAttention())
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _close(ours: Tensor, theirs: Tensor) -> None:
    rtol = 0.016 if ours.dtype == BF16 else 1e-5
    torch.testing.assert_close(ours.cpu().float(), theirs.float(), rtol=rtol, atol=rtol)


@both_dtypes
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(device: torch.device, dtype: torch.dtype, offset: float) -> None:
    wide = _randn(5, 150).to(dtype)  # rows that are longer than what is normed
    x, weight, hidden = (
        wide[:, :100],
        _randn(100, seed=1).to(dtype),
        _randn(5, 100, seed=2).to(dtype),
    )
    on = [each.to(device) for each in (wide, weight)]
    arguments = (1e-5, offset)
    _close(OURS.rms_norm(on[0][:, :100], on[1], *arguments), THEIRS.rms_norm(x, weight, *arguments))
    mine, other = hidden.to(device), hidden.clone()
    got = OURS.add_rms_norm(mine, on[0][:, :100], on[1], *arguments)
    _close(got, THEIRS.add_rms_norm(other, x, weight, *arguments))
    _close(mine, other)
    OURS.rms_norm_add(mine, on[0][:, :100], on[1], *arguments)
    THEIRS.rms_norm_add(other, x, weight, *arguments)
    _close(mine, other)


@both_dtypes
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    x = (3 * _randn(3, 2 * 1100)).to(dtype)
    _close(OURS.gated(x.to(device), kind), THEIRS.gated(x, kind))


@pytest.mark.parametrize(("rotary_dim", "normed"), [(0, "none"), (8, "keys"), (16, "both")])
def test_rotation_and_kv_write(device: torch.device, rotary_dim: int, normed: str) -> None:
    shape = AttentionShape(4, 2, 16, 0.25)
    qkv = _randn(27, 8, 16)
    norms = HeadNorms(
        _randn(16, seed=1) if normed == "both" else None,
        None if normed == "none" else _randn(16, seed=2),
        1e-5,
        0.5,
    )
    cases = [Case(shape, MIXED) for _ in range(2)]
    assert sum(n for _, n in MIXED) == len(qkv) - 1
    qkv = qkv[1:]  # not where its memory begins
    inv_freq = 10000.0 ** -(torch.arange(rotary_dim // 2) * 2.0 / 16)
    rotation = rotation_of(inv_freq, 1.5, cases[0].inputs.positions) if rotary_dim else None
    mine = cases[0].to(device)
    on = on_device(norms, device)
    turned = None if rotation is None else (rotation[0].to(device), rotation[1].to(device))
    got = OURS.rotate_and_write(qkv.to(device), shape, turned, on, mine.kv, mine.inputs)
    expected = THEIRS.rotate_and_write(qkv, shape, rotation, norms, cases[1].kv, cases[1].inputs)
    _close(got, expected)
    for name in ("keys", "values"):
        ours, theirs = (getattr(case.kv, name).cpu() for case in cases)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_an_int8_cache_and_padding(device: torch.device) -> None:
    shape = AttentionShape(2, 2, 16, 0.25)
    qkv = _randn(4, 6, 16)
    cases = [Case(shape, [(3, 2), (0, 2)]) for _ in range(2)]
    for case in cases:
        (keys, key_scales), (values, value_scales) = (
            quantize_kv(x.nan_to_num(0.0)) for x in (case.kv.keys, case.kv.values)
        )
        case.kv = LayerKV(keys, values, key_scales, value_scales)
        case.inputs = replace(case.inputs, slot_mapping=case.inputs.slot_mapping[:3])
    slots = torch.cat((cases[0].inputs.slot_mapping, torch.tensor([-1])))
    cases[0].inputs = replace(cases[0].inputs, slot_mapping=slots)
    mine = cases[0].to(device)
    OURS.rotate_and_write(qkv.to(device), shape, None, HeadNorms(), mine.kv, mine.inputs)
    THEIRS.rotate_and_write(qkv[:3], shape, None, HeadNorms(), cases[1].kv, cases[1].inputs)
    for name in ("keys", "values", "key_scales", "value_scales"):
        ours, theirs = (getattr(case.kv, name).cpu() for case in cases)
        torch.testing.assert_close(ours, theirs)


@both_dtypes
@pytest.mark.parametrize("format", get_args(QuantizedFormat))
@pytest.mark.parametrize("rows", [1, 70])
def test_quantised_products(
    device: torch.device, dtype: torch.dtype, format: str, rows: int
) -> None:
    x, bias = _randn(rows, 72).to(dtype), _randn(33, seed=2).to(dtype)
    weight = quantize(_randn(33, 72, seed=1), format)  # type: ignore[arg-type]
    mins = None if weight.mins is None else weight.mins.to(device)
    on = QuantizedLinear(weight.format, weight.codes.to(device), weight.scales.to(device), mins)
    got = OURS.linear(x.to(device), on, bias.to(device))
    exact = THEIRS.linear(x.float(), weight, bias.float())
    rtol = 0.03 if dtype == BF16 else 1e-5
    torch.testing.assert_close(got.cpu().float(), exact, rtol=rtol, atol=10 * rtol)


def test_a_row_has_the_same_bits_in_any_batch(device: torch.device) -> None:
    invariant = TritonOps(batch_invariant=True)
    x, weight = _randn(70, 200).to(device), _randn(40, 200, seed=1).to(device)
    together = invariant.linear(x, weight, None)
    torch.testing.assert_close(together.cpu(), x.cpu() @ weight.cpu().T, rtol=1e-5, atol=1e-5)
    for start, end in ((0, 1), (5, 9), (20, 60)):
        assert torch.equal(invariant.linear(x[start:end], weight, None), together[start:end])
