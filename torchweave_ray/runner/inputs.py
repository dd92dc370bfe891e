"""Scheduled sequences -> one flat varlen batch of tensors, and which of its rows need logits.

Built in numpy and moved to the device once. Knows block ids and token ids, not who owns them.
Draft tokens take the positions right behind a sequence's `num_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from torchweave_ray.attention.base import StepInputs
from torchweave_ray.engine.plan import ScheduledSequence, StepOutput


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
        if self.sequence.output is StepOutput.PROMPT_LOGPROBS:
            return self.num_positions
        return 1 + len(self.draft_token_ids)


def build_inputs(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> StepInputs:
    """The batch of these chunks, in their order; `logit_rows` are in their order too."""
    num_seqs = len(chunks)
    starts = np.array([c.sequence.start for c in chunks], dtype=np.int64)
    query_lens = np.array([c.num_positions for c in chunks], dtype=np.int64)
    seq_lens = starts + query_lens
    query_start_loc = np.zeros(num_seqs + 1, dtype=np.int64)
    np.cumsum(query_lens, out=query_start_loc[1:])
    num_tokens = int(query_start_loc[-1])

    owners = np.repeat(np.arange(num_seqs), query_lens)  # [T]: the sequence of each token
    positions = np.arange(num_tokens) + (starts - query_start_loc[:-1])[owners]
    block_tables = _block_tables(chunks, -(-seq_lens // block_size))
    blocks = block_tables[owners, positions // block_size]
    slot_mapping = blocks.astype(np.int64) * block_size + positions % block_size

    def tensor(array: NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return StepInputs(
        input_ids=tensor(_token_ids(chunks, num_tokens)),
        positions=tensor(positions),
        slot_mapping=tensor(slot_mapping),
        query_start_loc=tensor(query_start_loc.astype(np.int32)),
        seq_lens=tensor(seq_lens.astype(np.int32)),
        block_tables=tensor(block_tables),
        logit_rows=tensor(_logit_rows(chunks, query_start_loc)),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
    )


def _token_ids(chunks: Sequence[Chunk], num_tokens: int) -> NDArray[np.int64]:
    token_ids: list[int] = []
    for chunk in chunks:
        seq = chunk.sequence
        token_ids += seq.token_ids[seq.start : seq.start + seq.num_tokens]
        token_ids += chunk.draft_token_ids
    assert len(token_ids) == num_tokens
    return np.array(token_ids, dtype=np.int64)


def _block_tables(chunks: Sequence[Chunk], num_blocks: NDArray[np.int64]) -> NDArray[np.int32]:
    tables = np.zeros((len(chunks), int(num_blocks.max())), dtype=np.int32)
    for row, (chunk, num) in enumerate(zip(chunks, num_blocks.tolist(), strict=True)):
        tables[row, :num] = chunk.sequence.block_table[:num]
    return tables


def _logit_rows(chunks: Sequence[Chunk], query_start_loc: NDArray[np.int64]) -> NDArray[np.int64]:
    ends = query_start_loc[1:].tolist()
    return np.array(
        [
            row
            for chunk, end in zip(chunks, ends, strict=True)
            for row in range(end - chunk.num_logit_rows, end)
        ],
        dtype=np.int64,
    )
