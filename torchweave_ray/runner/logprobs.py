"""Log-probabilities of chosen tokens and of the likeliest ones, from raw logits.

Raw: before bans, biases, penalties, bitmask and temperature. Knows no sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweave_ray.outputs import TokenLogprobs
from torchweave_ray.runner.device import Fetch

_ROWS_AT_ONCE = 64
"""Bounds the copies of [rows, vocab] that a long prompt's logprobs make."""


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """One entry a row of logits [R, V] float32, for token_ids [R], with num_top [R] likeliest.

    rank is 1 + the number of tokens with a strictly larger logit. Equal ones in `top` stand in
    id order.
    """
    entries: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        ids = torch.tensor(token_ids[rows], device=logits.device)
        entries += TokenScores(logits[rows], ids, num_top[rows]).entries()
    return entries


class TokenScores:
    """As `token_logprobs`, on their way: computed where the logits are, fetched when asked for."""

    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> None:
        """token_ids [R] int64 on the logits' device; negative ones give entries of no use."""
        ids = token_ids.clamp(min=0)[:, None]
        logprobs = torch.log_softmax(logits, dim=-1)
        ranks = 1 + (logits > logits.gather(1, ids)).sum(dim=-1)
        most = min(max(num_top, default=0), logits.shape[1])
        top = logprobs.topk(most, dim=-1)
        self._num_top = num_top
        self._fetch = Fetch(
            [ids[:, 0], logprobs.gather(1, ids)[:, 0], ranks, top.indices, top.values]
        )

    def entries(self) -> list[TokenLogprobs]:
        ids, chosen, ranks, top_ids, top = (each.tolist() for each in self._fetch.get())
        return [
            TokenLogprobs(token_id, logprob, rank, _likeliest(row_ids, row)[:num])
            for token_id, logprob, rank, row_ids, row, num in zip(
                ids, chosen, ranks, top_ids, top, self._num_top, strict=True
            )
        ]


def _likeliest(token_ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
    pairs = zip(token_ids, logprobs, strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
