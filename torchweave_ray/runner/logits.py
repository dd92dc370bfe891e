"""Edits of logits before the draw: bans, biases, penalties, bitmask, in this order, in place.

Only rows that ask for something are touched, all of them together. Knows nothing of drawing.
Order: banned ids -> allowed ids -> logit_bias -> repetition, then presence and frequency
penalties -> bitmask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchweave_ray.sampling_params import SamplingParams

_EVERYTHING_ALLOWED = np.int32(-1)


class TokenCounts:
    """The distinct tokens of one sequence and how often each stands in its output.

    Grows with the sequence, so that a step costs its new tokens, not the whole context.
    """

    def __init__(self) -> None:
        self._num_seen = 0
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)

    def advance(self, token_ids: Sequence[int], num_tokens: int, num_prompt_tokens: int) -> None:
        """Count what token_ids[:num_tokens], the whole sequence, gained since the last call."""
        assert num_tokens >= self._num_seen
        for position in range(self._num_seen, num_tokens):
            self._add(token_ids[position], position >= num_prompt_tokens)
        self._num_seen = num_tokens

    def with_output(self, token_ids: Sequence[int]) -> TokenCounts:
        """A copy that has these as further output: the rows behind draft tokens."""
        copy = TokenCounts()
        copy._num_seen = self._num_seen + len(token_ids)
        copy._slots = dict(self._slots)
        copy._ids, copy._counts = self._ids.copy(), self._counts.copy()
        for token_id in token_ids:
            copy._add(token_id, True)
        return copy

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids, occurrences in the output), both [number of distinct tokens]."""
        num = len(self._slots)
        return self._ids[:num], self._counts[:num]

    def _add(self, token_id: int, is_output: bool) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        self._counts[slot] += is_output


@dataclass(frozen=True, slots=True)
class LogitsEdit:
    """What happens to one row of logits."""

    row: int
    sampling: SamplingParams
    banned_token_ids: tuple[int, ...] = ()
    counts: TokenCounts | None = None
    """Set where the row has penalties."""
    allowed: NDArray[np.int32] | None = None
    """[ceil(vocab_size / 32)], bit set: allowed."""


def bad_word_ends(
    bad_words: Sequence[Sequence[int]], output_token_ids: Sequence[int]
) -> tuple[int, ...]:
    """The tokens that would complete a bad word right behind this output."""
    return tuple(
        word[-1]
        for word in bad_words
        if len(word) == 1 or list(output_token_ids[1 - len(word) :]) == list(word[:-1])
    )


def is_constrained(words: NDArray[np.int32]) -> bool:
    """Whether a row of a bitmask forbids anything (a free row is all ones)."""
    return bool((words != _EVERYTHING_ALLOWED).any())


def is_allowed(words: NDArray[np.int32], token_id: int) -> bool:
    return bool(words[token_id // 32] >> token_id % 32 & 1)


def edit_logits(logits: Tensor, edits: Sequence[LogitsEdit]) -> None:
    """Change logits [R, V] float32 in place."""
    if not edits:
        return
    _ban(logits, edits)
    _keep_allowed(logits, edits)
    _add_bias(logits, edits)
    _penalise(logits, [e for e in edits if e.counts is not None])
    _mask(logits, [e for e in edits if e.allowed is not None])


def _ban(logits: Tensor, edits: Sequence[LogitsEdit]) -> None:
    pairs = [(e.row, token_id) for e in edits for token_id in e.banned_token_ids]
    if pairs:
        rows, ids = torch.tensor(pairs, device=logits.device).T
        logits[rows, ids] = -torch.inf


def _keep_allowed(logits: Tensor, edits: Sequence[LogitsEdit]) -> None:
    for edit in edits:
        if edit.sampling.allowed_token_ids is not None:
            ids = torch.tensor(edit.sampling.allowed_token_ids, device=logits.device)
            kept = logits[edit.row, ids]
            logits[edit.row] = -torch.inf
            logits[edit.row, ids] = kept


def _add_bias(logits: Tensor, edits: Sequence[LogitsEdit]) -> None:
    pairs = [(e.row, token_id) for e in edits for token_id in e.sampling.logit_bias]
    if pairs:
        rows, ids = torch.tensor(pairs, device=logits.device).T
        biases = [bias for e in edits for bias in e.sampling.logit_bias.values()]
        logits[rows, ids] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)


def _penalise(logits: Tensor, edits: Sequence[LogitsEdit]) -> None:
    if not edits:
        return
    arrays = [e.counts.arrays() for e in edits if e.counts is not None]
    sizes = [len(ids) for ids, _ in arrays]

    def spread(values: list[float]) -> Tensor:
        repeated = np.repeat(np.array(values, dtype=np.float32), sizes)
        return torch.from_numpy(repeated).to(logits.device)

    rows = torch.from_numpy(np.repeat([e.row for e in edits], sizes)).to(logits.device)
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in arrays])).to(logits.device)
    counts = torch.from_numpy(np.concatenate([c for _, c in arrays])).to(logits.device)
    repetition = spread([e.sampling.repetition_penalty for e in edits])
    seen = logits[rows, ids]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= spread([e.sampling.presence_penalty for e in edits]) * (counts > 0)
    seen -= spread([e.sampling.frequency_penalty for e in edits]) * counts
    logits[rows, ids] = seen


def _mask(logits: Tensor, edits: Sequence[LogitsEdit]) -> None:
    if not edits:
        return
    if logits.device.type == "cpu":
        for edit in edits:
            _mask_row(logits[edit.row].numpy(), edit)
        return
    words = np.stack([e.allowed for e in edits if e.allowed is not None])
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1])
    forbidden = torch.from_numpy(bits == 0).to(logits.device)
    rows = torch.tensor([e.row for e in edits], device=logits.device)
    logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


def _mask_row(row: NDArray[np.float32], edit: LogitsEdit) -> None:
    """Touch what is rarer: a grammar mostly allows a handful of tokens, or all but a few."""
    assert edit.allowed is not None
    bits = np.unpackbits(edit.allowed.view(np.uint8), bitorder="little", count=len(row))
    allowed = bits.view(np.bool_)
    if 2 * np.count_nonzero(allowed) > len(row):
        row[np.flatnonzero(~allowed)] = -np.inf
    else:
        ids = np.flatnonzero(allowed)
        kept = row[ids]
        row.fill(-np.inf)
        row[ids] = kept
