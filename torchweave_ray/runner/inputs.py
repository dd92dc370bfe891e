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

from torchweave_ray.attention.base import AdapterRows, StepInputs
from torchweave_ray.engine.plan import ScheduledSequence, StepOutput

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
        if self.sequence.output is StepOutput.NONE:
            return 0
        if self.sequence.output in (StepOutput.PROMPT_LOGPROBS, StepOutput.POOL_ALL):
            return self.num_positions
        return 1 + len(self.draft_token_ids)


def build_inputs(
    chunks: Sequence[Chunk],
    block_size: int,
    device: torch.device,
    adapters: Mapping[str, object] = _NONE,
) -> StepInputs:
    """The batch of these chunks, in their order; `logit_rows` are in their order too.

    `adapters`: those that are loaded; chunks of one are next to each other, those of none first.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    query_start_loc = [0]
    for chunk in chunks:
        seq = chunk.sequence
        start, end = seq.start, seq.start + chunk.num_positions
        token_ids += seq.token_ids[start : start + seq.num_tokens]
        token_ids += chunk.draft_token_ids
        positions += range(start, end)
        for block in range(start // block_size, -(-end // block_size)):
            first = block * block_size
            offset = seq.block_table[block] * block_size - first
            slots += range(max(start, first) + offset, min(end, first + block_size) + offset)
        query_start_loc.append(len(positions))
        logit_rows += range(len(positions) - chunk.num_logit_rows, len(positions))
    assert len(token_ids) == len(positions)
    seq_lens = [chunk.sequence.start + chunk.num_positions for chunk in chunks]
    longest = max(seq_lens)
    width = -(-longest // block_size)
    tables: list[int] = []
    for chunk, length in zip(chunks, seq_lens, strict=True):
        num = -(-length // block_size)
        tables += chunk.sequence.block_table[:num]
        tables += [0] * (width - num)
    wide = _pack(np.int64, device, token_ids, positions, slots, logit_rows)
    narrow = _pack(np.int32, device, query_start_loc, seq_lens, tables)
    return StepInputs(
        input_ids=wide[0],
        positions=wide[1],
        slot_mapping=wide[2],
        query_start_loc=narrow[0],
        seq_lens=narrow[1],
        block_tables=narrow[2].view(len(chunks), width),
        logit_rows=wide[3],
        max_query_len=max(chunk.num_positions for chunk in chunks),
        max_seq_len=longest,
        adapters=_adapter_rows(chunks, query_start_loc, adapters),
    )


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
    dtype: type[np.int64 | np.int32], device: torch.device, *lists: list[int]
) -> tuple[torch.Tensor, ...]:
    """One tensor each, all in one piece of memory: one conversion and one transfer."""
    ends = list(accumulate(len(values) for values in lists))
    flat = torch.from_numpy(np.array(list(chain(*lists)), dtype=dtype)).to(device)
    return tuple(flat[end - len(values) : end] for values, end in zip(lists, ends, strict=True))
