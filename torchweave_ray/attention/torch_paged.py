"""Paged attention in plain torch: the reference that every other backend equals. CPU and CUDA.

Sequences of a step that bring equally many tokens are one padded, masked computation: all decodes
are one, drafts another, prompt chunks usually one each. Knows nothing of models or scheduling.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from torchweave_ray.attention.base import (
    AttentionShape,
    LayerKV,
    StepInputs,
    dequantize_kv,
    quantize_kv,
)


@dataclass(frozen=True, slots=True)
class _Group:
    """S sequences of n new tokens each, padded to L cached positions (whole blocks)."""

    rows: slice | Tensor
    """Their S * n rows of the batch."""
    query_len: int
    num_seqs: int
    blocks: Tensor
    """[S * num_kv_heads * L / block_size] rows of the cache seen as [.., block_size * head_dim]."""
    tail: tuple[Tensor, Tensor]
    """(sequence, position) pairs that no query sees: behind a sequence's end, before its window.
    Whatever other sequences left in there, NaN even, must not count, and a masked weight of 0 is
    not enough for that: 0 * NaN is NaN."""
    bias: Tensor
    """[S, 1, group_size * n, L]: 0 where a query sees a position, -inf elsewhere."""


class TorchPagedAttention:
    """An `AttentionBackend`. Keeps what the layers of one step have in common until the next
    step; so `StepInputs` is made anew for every step, never changed in place.
    """

    def __init__(self) -> None:
        self._inputs: StepInputs | None = None
        self._slots: dict[tuple[int, int, int], Tensor] = {}
        self._groups: dict[tuple[object, ...], list[_Group]] = {}

    def write_kv(self, keys: Tensor, values: Tensor, kv: LayerKV, inputs: StepInputs) -> None:
        """Put this step's keys and values, [T, num_kv_heads, head_dim], into their slots."""
        self._begin(inputs)
        _, num_kv_heads, block_size, head_dim = kv.keys.shape
        key = (kv.group, num_kv_heads, block_size)
        if key not in self._slots:
            self._slots[key] = _slot_rows(inputs.slots_of(kv.group), num_kv_heads, block_size)
        rows = self._slots[key]
        pairs = ((kv.keys, kv.key_scales, keys), (kv.values, kv.value_scales, values))
        for cache, scales, new in pairs:
            new_rows = new.reshape(-1, head_dim)
            if scales is not None:
                new_rows, new_scales = quantize_kv(new_rows)
                scales.view(-1).index_copy_(0, rows, new_scales)
            cache.view(-1, head_dim).index_copy_(0, rows, new_rows.to(cache.dtype))

    def forward(
        self, queries: Tensor, kv: LayerKV, inputs: StepInputs, shape: AttentionShape
    ) -> Tensor:
        """Causal attention of queries [T, num_heads, head_dim] -> [T, num_heads, head_dim]."""
        self._begin(inputs)
        block_size = kv.keys.shape[2]
        heads = shape.num_heads, shape.num_kv_heads
        key = (kv.group, *heads, shape.sliding_window, block_size, queries.dtype)
        if key not in self._groups:
            tables = inputs.tables_of(kv.group)
            self._groups[key] = _group(inputs, tables, shape, block_size, queries.dtype)
        out = torch.empty_like(queries)
        for group in self._groups[key]:
            out[group.rows] = _attend(queries[group.rows], kv, group, shape)
        return out

    def _begin(self, inputs: StepInputs) -> None:
        if self._inputs is not inputs:
            self._inputs = inputs
            self._slots.clear()
            self._groups.clear()


def _attend(queries: Tensor, kv: LayerKV, group: _Group, shape: AttentionShape) -> Tensor:
    """[S * n, num_heads, head_dim] of one group. A KV head's queries lie side by side, so that
    grouped-query attention needs no copies of keys: [S, num_kv_heads, group_size * n, head_dim]."""
    num_seqs, n, dim = group.num_seqs, group.query_len, shape.head_dim
    group_size = shape.num_heads // shape.num_kv_heads
    q = queries.view(num_seqs, n, shape.num_kv_heads, group_size, dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(num_seqs, shape.num_kv_heads, group_size * n, dim)
    k = _gather(kv.keys, kv.key_scales, group, shape.num_kv_heads, q.dtype)
    v = _gather(kv.values, kv.value_scales, group, shape.num_kv_heads, q.dtype)
    if shape.soft_cap is None:
        out = functional.scaled_dot_product_attention(q, k, v, group.bias, scale=shape.scale)
    else:
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * shape.scale
        scores = torch.tanh(scores / shape.soft_cap) * shape.soft_cap + group.bias
        out = torch.matmul(functional.softmax(scores, dim=-1), v.float()).to(q.dtype)
    out = out.view(num_seqs, shape.num_kv_heads, group_size, n, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_seqs * n, shape.num_heads, dim)


def _gather(
    cache: Tensor, scales: Tensor | None, group: _Group, num_kv_heads: int, dtype: torch.dtype
) -> Tensor:
    """A group's cached keys or values: [S, num_kv_heads, L, head_dim]; unseen ones are 0."""
    block_size, dim = cache.shape[2:]
    found = cache.view(-1, block_size * dim).index_select(0, group.blocks)
    if scales is not None:
        of_found = scales.view(-1, block_size).index_select(0, group.blocks)
        found = dequantize_kv(found.view(-1, block_size, dim), of_found)
    found = found.view(group.num_seqs, num_kv_heads, -1, dim)
    found[group.tail[0], :, group.tail[1]] = 0
    return found.to(dtype)


def _slot_rows(slot_mapping: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """[T * num_kv_heads] rows of a cache seen as [num_blocks * num_kv_heads * block_size, dim]."""
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    heads = torch.arange(num_kv_heads, device=slot_mapping.device)
    rows = (blocks[:, None] * num_kv_heads + heads) * block_size
    return (rows + (slot_mapping % block_size)[:, None]).flatten()


def _group(
    inputs: StepInputs,
    tables: Tensor,
    shape: AttentionShape,
    block_size: int,
    dtype: torch.dtype,
) -> list[_Group]:
    """The sequences of a step by number of new tokens. `tables`: [S, max_blocks]. On a GPU this
    waits for the device once."""
    starts = inputs.query_start_loc.tolist()
    seq_lens = inputs.seq_lens.tolist()
    by_length: dict[int, list[int]] = {}
    for s, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start:
            by_length.setdefault(end - start, []).append(s)
    return [
        _make_group(inputs, tables, shape, block_size, dtype, n, members, starts, seq_lens)
        for n, members in by_length.items()
    ]


def _make_group(
    inputs: StepInputs,
    tables: Tensor,
    shape: AttentionShape,
    block_size: int,
    dtype: torch.dtype,
    n: int,
    members: list[int],
    starts: list[int],
    seq_lens: list[int],
) -> _Group:
    device = inputs.seq_lens.device
    num_blocks = -(-max(seq_lens[s] for s in members) // block_size)
    member_ids = torch.tensor(members, device=device)
    rows: slice | Tensor = slice(starts[members[0]], starts[members[-1] + 1])
    if members[-1] - members[0] + 1 != len(members):
        first_rows = torch.tensor([starts[s] for s in members], device=device)
        rows = (first_rows[:, None] + torch.arange(n, device=device)).flatten()

    tables = tables.index_select(0, member_ids)[:, None, :num_blocks].long()
    heads = torch.arange(shape.num_kv_heads, device=device)[:, None]
    blocks = (tables * shape.num_kv_heads + heads).flatten()

    lengths = inputs.seq_lens.index_select(0, member_ids).long()[:, None]
    positions = torch.arange(num_blocks * block_size, device=device)
    unseen = positions >= lengths
    if shape.sliding_window is not None:  # blocks in there may be others' by now
        unseen |= positions <= lengths - n - shape.sliding_window
    seq_index, tail_positions = unseen.nonzero(as_tuple=True)
    query_positions = (lengths - n + torch.arange(n, device=device))[:, :, None]
    hidden = positions > query_positions  # [S, n, L]
    if shape.sliding_window is not None:
        hidden |= positions <= query_positions - shape.sliding_window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
    group_size = shape.num_heads // shape.num_kv_heads
    bias = bias[:, None, None].expand(-1, 1, group_size, -1, -1).flatten(2, 3)
    return _Group(rows, n, len(members), blocks, (seq_index, tail_positions), bias)
