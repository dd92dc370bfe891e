"""The reference attention against the textbook formula, one sequence and one head at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.attention_case import BLOCK_SIZE, MIXED, Case, among_groups
from tests.parity.paged import Text, make_inputs
from torchweave_ray.attention.base import (
    AttentionShape,
    LayerKV,
    dequantize_kv,
    quantize_kv,
)
from torchweave_ray.attention.torch_paged import TorchPagedAttention


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_equals_the_formula(
    heads: int, kv_heads: int, window: int | None, soft_cap: float | None
) -> None:
    shape = AttentionShape(heads, kv_heads, 10, 0.3, window, soft_cap)
    case = Case(shape, MIXED)
    torch.testing.assert_close(case.run(TorchPagedAttention()), case.expected())


def test_each_step_and_each_layer_is_its_own() -> None:
    """One backend over two layers of different heads, then over another batch."""
    backend = TorchPagedAttention()
    narrow, wide = AttentionShape(4, 2, 8, 0.35), AttentionShape(6, 6, 4, 0.5, sliding_window=3)
    first, second = Case(narrow, MIXED), Case(wide, MIXED)
    second.inputs = first.inputs
    torch.testing.assert_close(first.run(backend), first.expected())
    torch.testing.assert_close(second.run(backend), second.expected())
    third = Case(narrow, [(2, 1), (8, 1)], seed=1)
    torch.testing.assert_close(third.run(backend), third.expected())


def test_a_crowd_changes_no_row() -> None:
    shape = AttentionShape(6, 2, 8, 1 / math.sqrt(8))
    crowd = Case(shape, [(10, 1), (35, 1), (1, 1), (0, 9)])
    together = crowd.run(TorchPagedAttention())
    starts = crowd.inputs.query_start_loc.tolist()
    for i, (start, n) in enumerate(crowd.spans):
        table = crowd.inputs.block_tables[i, : -(-(start + n) // BLOCK_SIZE)].tolist()
        alone = make_inputs([(Text([0] * (start + n), table, start), n)], BLOCK_SIZE)
        rows = slice(starts[i], starts[i + 1])
        got = TorchPagedAttention().forward(crowd.queries[rows], crowd.kv, alone, shape)
        torch.testing.assert_close(got, together[rows])


def test_a_layer_of_another_kv_group_has_its_own_slots_and_tables() -> None:
    backend = TorchPagedAttention()
    case = Case(AttentionShape(6, 2, 16, 0.25, sliding_window=5), MIXED)
    case.inputs, case.kv = among_groups(case.inputs, case.kv)
    torch.testing.assert_close(case.run(backend), case.expected())
    plain = case.kv
    case.kv = replace(plain, group=0)  # the same step, another group's table
    assert not case.run(backend).allclose(case.expected(), equal_nan=True)


def test_write_kv_touches_its_slots_only() -> None:
    shape = AttentionShape(2, 2, 4, 0.5)
    case = Case(shape, [(3, 2), (0, 1)])
    before = case.kv.keys.clone()
    case.run(TorchPagedAttention())
    changed = (case.kv.keys.nan_to_num(9.0) != before.nan_to_num(9.0)).any(-1).any(1)
    blocks, slots = changed.nonzero(as_tuple=True)
    written = sorted((blocks * BLOCK_SIZE + slots).tolist())
    assert written == sorted(case.inputs.slot_mapping.tolist())


def test_an_int8_cache_equals_the_formula_over_what_it_holds() -> None:
    shape = AttentionShape(6, 2, 16, 0.25, sliding_window=9)
    case = Case(shape, MIXED)
    for name in ("keys", "values"):
        cache = quantize_kv(getattr(case.kv, name))
        case.kv = replace(case.kv, **dict(zip((name, f"{name[:-1]}_scales"), cache, strict=True)))
    got = case.run(TorchPagedAttention())
    case.keys = [dequantize_kv(*quantize_kv(keys)) for keys in case.keys]
    case.values = [dequantize_kv(*quantize_kv(values)) for values in case.values]
    torch.testing.assert_close(got, case.expected())


def test_an_int8_code_is_within_half_a_step() -> None:
    x = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0)) * 10
    codes, scales = quantize_kv(x)
    assert (codes.dtype, scales.shape) == (torch.int8, (40, 3))
    error = (dequantize_kv(codes, scales) - x).abs().amax(dim=-1)
    assert (error <= scales * 0.5001).all()
    assert (codes.abs().amax(dim=-1) == 127).all()


def test_bfloat16_equals_its_own_inputs_in_float32() -> None:
    shape = AttentionShape(6, 2, 16, 0.25)
    case = Case(shape, MIXED)
    case.keys = [k.bfloat16().float() for k in case.keys]
    case.values = [v.bfloat16().float() for v in case.values]
    case.queries = case.queries.bfloat16().float()
    expected = case.expected()
    case.kv = LayerKV(case.kv.keys.bfloat16(), case.kv.values.bfloat16())
    case.queries = case.queries.bfloat16()
    got = case.run(TorchPagedAttention())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-2)
