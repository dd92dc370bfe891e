"""Paged attention and the KV write against their twins; splits, chunks and threads change no bit.

Every slot that a sequence does not own holds NaN.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.attention_case import among_groups
from torchweave_ray.attention.base import AttentionShape, LayerKV, StepInputs, quantize_kv
from torchweave_ray.kernels import twin
from torchweave_ray.kernels.kv_layout import pack_keys, pack_values, unpack_keys, unpack_values
from torchweave_ray.kernels.ops import NativeOps
from torchweave_ray.kernels.program import RopeTable

BF16 = torch.bfloat16
KV_DTYPES = [BF16, torch.int8]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences as (query length, sequence length), their cache filled up to the end."""

    inputs: StepInputs
    kv: LayerKV
    queries: Tensor


def _shape(
    heads: int = 4, kv_heads: int = 2, dim: int = 32, window: int | None = None, cap: float = 0.0
) -> AttentionShape:
    return AttentionShape(heads, kv_heads, dim, dim**-0.5, window, cap or None)


def _blank_kv(dims: tuple[int, ...], dtype: torch.dtype) -> LayerKV:
    if dtype == BF16:
        return LayerKV(*(torch.full(dims, torch.nan, dtype=BF16) for _ in range(2)))
    codes = [torch.full(dims, 77, dtype=torch.int8) for _ in range(2)]
    return LayerKV(*codes, *(torch.full(dims[:3], torch.nan) for _ in range(2)))


def _case(
    lens: Sequence[tuple[int, int]],
    shape: AttentionShape,
    block_size: int,
    dtype: torch.dtype = BF16,
) -> Case:
    sizes = [-(-seq_len // block_size) for _, seq_len in lens]
    blocks = list(range(sum(sizes) + 2))
    random.Random(0).shuffle(blocks)
    dims = (len(blocks), shape.num_kv_heads, block_size, shape.head_dim)
    kv = _blank_kv(dims, dtype)
    caches = ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
    tables = torch.zeros(len(lens), max(sizes, default=0), dtype=torch.int32)
    positions, new_slots, starts = [], [], [0]
    for s, (query_len, seq_len) in enumerate(lens):
        mine = [blocks.pop() for _ in range(sizes[s])]
        tables[s, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        at = torch.arange(seq_len)
        slots = (torch.tensor(mine)[at // block_size], slice(None), at % block_size)
        for i, (cache, scales) in enumerate(caches):
            new = _randn(seq_len, shape.num_kv_heads, shape.head_dim, seed=7 * s + i)
            if scales is None:
                cache[slots] = new.to(BF16)
            else:
                cache[slots], scales[slots] = quantize_kv(new)
        news = range(seq_len - query_len, seq_len)
        positions += news
        new_slots += [mine[p // block_size] * block_size + p % block_size for p in news]
        starts.append(starts[-1] + query_len)
    if dtype == BF16:
        kv = LayerKV(pack_keys(kv.keys), pack_values(kv.values))
    nothing = torch.zeros(starts[-1], dtype=torch.int64)
    inputs = StepInputs(
        input_ids=nothing,
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(new_slots, dtype=torch.int64),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32),
        block_tables=tables,
        logit_rows=nothing[:0],
        max_query_len=max((n for n, _ in lens), default=0),
        max_seq_len=max((n for _, n in lens), default=0),
    )
    columns = shape.num_heads * shape.head_dim
    return Case(inputs, kv, _randn(starts[-1], columns, seed=99).to(BF16))


MIXED = [(1, 1), (1, 17), (5, 5), (1, 300), (40, 40), (33, 290), (3, 700), (100, 612)]


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(
    "shape",
    [
        _shape(),
        _shape(3, 3, 16),
        _shape(9, 3, 64),
        _shape(8, 1, 80),
        _shape(6, 2, 128, window=20),
        _shape(2, 1, 256, cap=2.0),
        _shape(70, 1, 16, window=300, cap=5.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_attention_equals_the_twin(
    ops: NativeOps, shape: AttentionShape, block_size: int, dtype: torch.dtype
) -> None:
    case = _case(MIXED, shape, block_size, dtype)
    expected = twin.attend(case.queries, case.kv, case.inputs, shape)
    actual = ops.attend(case.queries, case.kv, case.inputs, shape)
    rounding = 4e-3 if dtype == BF16 else 2e-3  # shares beside a bf16 cache are bf16
    torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=rounding)


def test_a_bf16_cache_lies_as_its_products_read_it() -> None:
    rows = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).view(2, 3, 32, 48)
    keys, values = pack_keys(rows), pack_values(rows)
    assert torch.equal(unpack_keys(keys), rows)
    assert torch.equal(unpack_values(values), rows)
    subs = keys.view(2, 3, 2, 24, 16, 2)  # position 16 + 5, dims 14 and 15
    assert torch.equal(subs[1, 2, 1, 7, 5], rows[1, 2, 21, 14:16])
    pairs = values.view(2, 3, 16, 48, 2)  # dim 9 of positions 6 and 7
    assert torch.equal(pairs[1, 2, 3, 9], rows[1, 2, 6:8, 9])


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_an_empty_batch_gives_nothing(ops: NativeOps, dtype: torch.dtype) -> None:
    case = _case([], _shape(), 16, dtype)
    assert ops.attend(case.queries, case.kv, case.inputs, _shape()).shape == (0, 128)


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_rows", [1, 2, 21, 22, 64, 200])
def test_a_querys_bits_depend_on_its_context_only(
    ops: NativeOps, one_thread: NativeOps, num_rows: int, window: int | None, dtype: torch.dtype
) -> None:
    """The last rows of a prompt, computed as decodes, as a chunk and with the whole prompt."""
    shape = _shape(6, 2, 64, window)
    length = 620
    whole = _case([(length, length)], shape, 16, dtype)
    expected = ops.attend(whole.queries, whole.kv, whole.inputs, shape)[-num_rows:]
    chunk = _case([(num_rows, length)], shape, 16, dtype)
    for kernels in (ops, one_thread):
        actual = kernels.attend(whole.queries[-num_rows:], chunk.kv, chunk.inputs, shape)
        assert torch.equal(actual, expected)
    crowd = _case([(num_rows, length), (1, 40), (300, 300), (1, 513)], shape, 16, dtype)
    queries = torch.cat([whole.queries[-num_rows:], crowd.queries[num_rows:]])
    assert torch.equal(ops.attend(queries, crowd.kv, crowd.inputs, shape)[:num_rows], expected)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("dim", [16, 48, 64, 256])
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_queries_keys_and_values_equal_the_twin(
    ops: NativeOps, dtype: torch.dtype, dim: int, with_norms: bool, block_size: int
) -> None:
    shape = _shape(6, 2, dim)
    rope = RopeTable(tuple((10000.0 ** -(2 * i / dim)) for i in range(dim // 2)), 1.1)
    norms = (_randn(dim, seed=3), _randn(dim, seed=4)) if with_norms else (None, None)
    for used in (rope, None):
        native, torchs = (_case([(1, 30), (20, 37)], shape, block_size, dtype) for _ in range(2))
        qkv = _randn(21, 10 * dim)
        expected = twin.rope_kv(qkv, torchs.kv, torchs.inputs, shape, used, *norms)
        actual = ops.rope_kv(qkv, native.kv, native.inputs, shape, used, *norms)
        close = {"rtol": 1.6e-2, "atol": 2e-3, "equal_nan": True}
        torch.testing.assert_close(actual, expected, **close)
        if dtype == torch.int8:  # the last bit of a rotation may move a code by one
            close = {"rtol": 0.0, "atol": 1.0}
            torch.testing.assert_close(native.kv.key_scales, torchs.kv.key_scales, equal_nan=True)
            torch.testing.assert_close(
                native.kv.value_scales, torchs.kv.value_scales, rtol=0, atol=0, equal_nan=True
            )
        torch.testing.assert_close(native.kv.keys, torchs.kv.keys, **close)
        torch.testing.assert_close(native.kv.values, torchs.kv.values, **close)


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_a_layer_of_another_kv_group_has_its_own_slots_and_tables(
    ops: NativeOps, dtype: torch.dtype
) -> None:
    shape = _shape(6, 2, 64, window=100)
    qkv = _randn(sum(n for n, _ in MIXED), 10 * 64)
    results = []
    for kernels in (ops, twin):
        for is_among in (False, True):
            case = _case(MIXED, shape, 16, dtype)
            inputs, kv = among_groups(case.inputs, case.kv) if is_among else (case.inputs, case.kv)
            queries = kernels.rope_kv(qkv, kv, inputs, shape, None)
            results.append(kernels.attend(queries, kv, inputs, shape))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[3])


def test_int8_codes_are_the_twins_at_every_size_of_number(ops: NativeOps) -> None:
    """Zeros, denormals, huge ones, ties between codes; NaN and infinity spoil their own head."""
    shape = _shape(2, 2, 32)
    qkv = _randn(8, 6 * 32)
    scales = torch.tensor([1.0, 0.0, 1e-45, 3e-44, 1e-30, 1e30, 1.0, 1.0])
    qkv *= scales[:, None]
    qkv[0] = torch.arange(6 * 32) % 32 + 0.5
    qkv[0, ::32] = 127.0
    qkv[6, 4 * 32 + 5], qkv[7, 4 * 32] = torch.nan, -torch.inf  # values of head 0
    native, torchs = (_case([(8, 8)], shape, 16, torch.int8) for _ in range(2))
    twin.rope_kv(qkv, torchs.kv, torchs.inputs, shape, None)
    ops.rope_kv(qkv, native.kv, native.inputs, shape, None)
    assert torch.equal(native.kv.keys, torchs.kv.keys)
    assert torch.equal(native.kv.values, torchs.kv.values)
    exact = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(native.kv.value_scales, torchs.kv.value_scales, **exact)
    spoilt = torchs.kv.value_scales[torchs.inputs.block_tables[0].long()][..., :8].isnan()
    assert spoilt.sum(dim=(0, 2)).tolist() == [2, 0]
    attended = ops.attend(_randn(8, 64).bfloat16(), native.kv, native.inputs, shape)
    assert attended[6:, :32].isnan().all()
    assert not attended[:, 32:].isnan().any()
