"""Scheduled sequences -> one flat varlen batch of tensors, and which of its rows need logits.

Built as lists and moved to the device at once. Knows block ids and token ids, not who owns them.
Draft tokens take the positions right behind a sequence's `num_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchweave_ray.attention.base import AdapterRows, StepInputs
from torchweave_ray.engine.kv_groups import ONE_GROUP, KVGroups
from torchweave_ray.engine.plan import IN_FLIGHT, ScheduledSequence, StepOutput
from torchweave_ray.runner.device import upload

_NONE: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a batch."""

    sequence: ScheduledSequence
    draft_token_ids: tuple[int, ...] = ()
    """The drafts that are computed and verified; may be fewer than the plan's."""

    @property
    def num_positions(self) -> int:
        return self.sequence.num_tokens + len(self.draft_token_ids)

    @property
    def num_logit_rows(self) -> int:
        """The last rows of the chunk, so many of them."""
        output = self.sequence.output
        if output is StepOutput.SAMPLE or output is StepOutput.POOL:
            return 1 + len(self.draft_token_ids)
        return 0 if output is StepOutput.NONE else self.num_positions


@dataclass(frozen=True, slots=True)
class LastTokens:
    """What the step before draws: the device may be at it still."""

    ids: Tensor  # [R] int64; negative where there is no token, and nobody will use what comes of it
    rows: Mapping[int, int]
    """Of `ids`, by seq_id."""


@dataclass(frozen=True, slots=True)
class Padding:
    """The size to which a batch of decodes is filled up."""

    num_seqs: int
    num_blocks: int
    """Of each block table."""


def build_inputs(
    chunks: Sequence[Chunk],
    block_size: int,
    device: torch.device,
    adapters: Mapping[str, object] = _NONE,
    last: LastTokens | None = None,
    padding: Padding | None = None,
    groups: KVGroups = ONE_GROUP,
) -> StepInputs:
    """The batch of these chunks, in their order; `logit_rows` are in their order too.

    `adapters`: those that are loaded; chunks of one are next to each other, those of none first.
    `last`: for tokens that are in flight. `padding`: sequences of one token that stand for nothing
    are added at the end.
    """
    flat = _Flat(block_size, groups.num)
    for chunk in chunks:
        flat.add(chunk)
    num_seqs = len(chunks)
    seq_lens = [chunk.sequence.start + chunk.num_positions for chunk in chunks]
    longest = max(seq_lens)
    width = -(-longest // block_size)
    if padding is not None:
        flat.pad(padding.num_seqs - num_seqs)
        seq_lens += [1] * (padding.num_seqs - num_seqs)
        width, longest = padding.num_blocks, padding.num_blocks * block_size
    tables = _tables(chunks, seq_lens, (groups.num, len(seq_lens), width), block_size, groups)
    slots = flat.slots[0] if groups.num == 1 else [*chain.from_iterable(flat.slots)]
    wide = _pack(np.int64, device, flat.token_ids, flat.positions, slots, flat.logit_rows)
    narrow = _pack(np.int32, device, flat.starts, seq_lens, tables.ravel())
    _fill_in_flight(wide[0], flat.in_flight, last)
    return StepInputs(
        input_ids=wide[0],
        positions=wide[1],
        slot_mapping=wide[2],
        query_start_loc=narrow[0],
        seq_lens=narrow[1],
        block_tables=narrow[2].view(-1, width),
        logit_rows=wide[3],
        max_query_len=max(chunk.num_positions for chunk in chunks),
        max_seq_len=longest,
        adapters=_adapter_rows(chunks, flat.starts, adapters),
        num_padding=len(seq_lens) - num_seqs,
        packed=None if padding is None else (wide[-1], narrow[-1]),
    )


def _tables(
    chunks: Sequence[Chunk],
    seq_lens: Sequence[int],
    shape: tuple[int, int, int],
    block_size: int,
    groups: KVGroups,
) -> NDArray[np.int32]:
    """[groups, sequences, blocks]; what was dropped, or is nobody's, is 0."""
    tables = np.zeros(shape, dtype=np.int32)
    for group, rows in enumerate(tables):
        for row, (chunk, length) in enumerate(zip(chunks, seq_lens, strict=False)):
            seq, num, first = chunk.sequence, -(-length // block_size), 0
            if group >= groups.num_full:
                first = groups.num_dropped(seq.start // block_size)
            rows[row, first:num] = seq.block_tables[group][first:num]
    return tables


class _Flat:
    """The chunks' tokens one behind the other."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        self._block_size = block_size
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[list[int]] = [[] for _ in range(num_groups)]
        """Of each KV group."""
        self.logit_rows: list[int] = []
        self.starts = [0]
        self.in_flight: list[tuple[int, int]] = []
        """(token, seq_id) of those that the step before draws."""

    def add(self, chunk: Chunk) -> None:
        seq, num_positions = chunk.sequence, chunk.num_positions
        start = seq.start
        self.token_ids += seq.token_ids[start : start + seq.num_tokens]
        if self.token_ids[-1] == IN_FLIGHT:
            self.in_flight.append((len(self.token_ids) - 1, seq.seq_id))
        if num_positions == 1:  # of most steps all chunks are
            self.positions.append(start)
            block, offset = divmod(start, self._block_size)
            for slots, table in zip(self.slots, seq.block_tables, strict=True):
                slots.append(table[block] * self._block_size + offset)
        else:
            self.token_ids += chunk.draft_token_ids
            self.positions += range(start, start + num_positions)
            for slots, table in zip(self.slots, seq.block_tables, strict=True):
                self._add_slots(slots, table, start, start + num_positions)
        num = len(self.positions)
        assert len(self.token_ids) == num
        self.starts.append(num)
        self.logit_rows += range(num - chunk.num_logit_rows, num)

    def _add_slots(self, slots: list[int], table: Sequence[int], start: int, end: int) -> None:
        block_size = self._block_size
        for block in range(start // block_size, -(-end // block_size)):
            first = block * block_size
            offset = table[block] * block_size - first
            slots += range(max(start, first) + offset, min(end, first + block_size) + offset)

    def pad(self, num: int) -> None:
        first = len(self.positions)
        self.token_ids += [0] * num
        self.positions += [0] * num
        for slots in self.slots:
            slots += [-1] * num
        self.logit_rows += range(first, first + num)
        self.starts += range(first + 1, first + num + 1)


def _fill_in_flight(
    input_ids: Tensor, in_flight: Sequence[tuple[int, int]], last: LastTokens | None
) -> None:
    if not in_flight:
        return
    assert last is not None, "a token is in flight, but no step draws it"
    pairs = [(token, last.rows[seq_id]) for token, seq_id in in_flight]
    tokens, rows = upload(np.array(pairs, dtype=np.int64).T.copy(), input_ids.device)
    input_ids[tokens] = last.ids.to(input_ids.device)[rows].clamp(min=0)


def _adapter_rows(
    chunks: Sequence[Chunk], starts: Sequence[int], adapters: Mapping[str, object]
) -> tuple[AdapterRows, ...]:
    rows: list[AdapterRows] = []
    last = ""
    for chunk, start, end in zip(chunks, starts, starts[1:], strict=False):
        adapter_id = chunk.sequence.adapter_id
        if adapter_id and adapter_id == last:
            rows[-1] = replace(rows[-1], end=end)
        elif adapter_id:
            rows.append(AdapterRows(adapters[adapter_id], start, end))
        last = adapter_id
    return tuple(rows)


def _pack(
    dtype: type[np.int64 | np.int32],
    device: torch.device,
    *parts: Sequence[int] | NDArray[np.int32],
) -> tuple[Tensor, ...]:
    """One tensor each, all in one piece of memory, which is the last: one transfer."""
    ends = list(accumulate(len(part) for part in parts))
    flat = np.empty(ends[-1], dtype=dtype)
    for end, part in zip(ends, parts, strict=True):
        flat[end - len(part) : end] = part
    moved = upload(flat, device)
    each = (moved[end - len(part) : end] for end, part in zip(ends, parts, strict=True))
    return (*each, moved)
