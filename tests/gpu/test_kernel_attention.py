"""Our Triton attention against the textbook formula: windows, soft caps, groups, splits, int8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.attention_case import BLOCK_SIZE, MIXED, Case, among_groups
from tests.parity.paged import Text, make_inputs
from torchweave_ray.attention.base import (
    AttentionShape,
    LayerKV,
    quantize_kv,
)
from torchweave_ray.attention.torch_paged import TorchPagedAttention

pytest.importorskip("triton", reason="triton, the language of the kernels, is not installed")
from torchweave_ray.attention.triton_paged import TritonPagedAttention

LONG = [(0, 1), (130, 1), (0, 20), (64, 1), (100, 25), (127, 2)]
"""Of up to three splits of 64 positions; chunks of one tile and of more."""


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(6, 2, 10, 0.3),
        AttentionShape(3, 3, 16, 0.3, sliding_window=5),
        AttentionShape(4, 1, 16, 0.3, sliding_window=1, soft_cap=3.0),
        AttentionShape(20, 1, 16, 0.3, sliding_window=1000),
    ],
    ids=str,
)
def test_equals_the_formula(device: torch.device, shape: AttentionShape) -> None:
    case = Case(shape, MIXED).to(device)
    torch.testing.assert_close(case.run(TritonPagedAttention(split=64)), case.expected())


def test_a_layer_of_another_kv_group_has_its_own_slots_and_tables(device: torch.device) -> None:
    case = Case(AttentionShape(6, 2, 10, 0.3, sliding_window=5), MIXED)
    case.inputs, case.kv = among_groups(case.inputs, case.kv)
    got = case.to(device).run(TritonPagedAttention(split=64))
    torch.testing.assert_close(got, case.expected())


@pytest.mark.parametrize(("window", "max_splits"), [(None, 32), (70, 2), (None, 1)])
def test_long_contexts_are_split_and_merged(
    device: torch.device, window: int | None, max_splits: int
) -> None:
    """A context of 131 positions, in three splits of 64, two of 128, or one of 256."""
    case = Case(AttentionShape(4, 2, 16, 0.25, window), LONG).to(device)
    got = case.run(TritonPagedAttention(split=64, max_splits=max_splits))
    torch.testing.assert_close(got, case.expected())


def test_an_int8_cache_is_quantised_and_read_as_the_reference_does(device: torch.device) -> None:
    shape = AttentionShape(6, 2, 16, 0.25, sliding_window=9)
    cases = [Case(shape, MIXED) for _ in range(2)]
    for case in cases:
        for name in ("keys", "values"):
            codes, scales = quantize_kv(getattr(case.kv, name))
            case.kv = replace(case.kv, **{name: codes, f"{name[:-1]}_scales": scales})
    got = cases[0].to(device).run(TritonPagedAttention(split=64))
    torch.testing.assert_close(got, cases[1].run(TorchPagedAttention()))
    for name in ("keys", "values"):  # a quotient may be rounded the other way at a tie
        ours, theirs = (getattr(case.kv, name).cpu().int() for case in cases)
        assert (ours - theirs).abs().max() <= 1
        ours, theirs = (getattr(case.kv, f"{name[:-1]}_scales").cpu() for case in cases)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_in_bfloat16(device: torch.device) -> None:
    case = Case(AttentionShape(4, 2, 16, 0.25), MIXED)
    case.keys, case.values = ([x.bfloat16().float() for x in a] for a in (case.keys, case.values))
    case.queries = case.queries.bfloat16().float()
    expected = case.expected()
    case.kv = LayerKV(case.kv.keys.bfloat16(), case.kv.values.bfloat16())
    case.queries = case.queries.bfloat16()
    got = case.to(device).run(TritonPagedAttention())
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)


def test_a_crowd_changes_no_bit(device: torch.device) -> None:
    """Neither of decodes nor of drafts nor of prompt chunks, split or not."""
    crowd = Case(AttentionShape(4, 2, 16, 0.25), LONG).to(device)
    together = crowd.run(TritonPagedAttention(split=64))
    starts = crowd.inputs.query_start_loc.tolist()
    for i, (start, n) in enumerate(crowd.spans):
        table = crowd.inputs.block_tables[i, : -(-(start + n) // BLOCK_SIZE)].tolist()
        alone = Case(crowd.shape, [(start, n)])
        alone.kv, alone.inputs = (
            crowd.kv,
            make_inputs([(Text([0] * (start + n), table, start), n)], BLOCK_SIZE),
        )
        alone.keys, alone.values = [crowd.keys[i]], [crowd.values[i]]
        alone.queries = crowd.queries[starts[i] : starts[i + 1]]
        got = alone.to(device).run(TritonPagedAttention(split=64))
        assert torch.equal(got, together[starts[i] : starts[i + 1]])


def test_padding_is_written_nowhere(device: torch.device) -> None:
    case = Case(AttentionShape(2, 2, 16, 0.5), [(3, 1), (0, 1)])
    slots = case.inputs.slot_mapping.clone()
    case.inputs = replace(case.inputs, slot_mapping=torch.where(slots == slots[1], -1, slots))
    before = case.kv.keys.clone()
    case.to(device).run(TritonPagedAttention())
    changed = (case.kv.keys.cpu().nan_to_num(9.0) != before.nan_to_num(9.0)).any(-1).any(1)
    blocks, offsets = changed.nonzero(as_tuple=True)
    assert (blocks * BLOCK_SIZE + offsets).tolist() == [slots[0]]
