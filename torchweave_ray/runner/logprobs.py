"""Log-probabilities of chosen tokens and of the likeliest ones, from raw logits.

Raw: before bans, biases, penalties, bitmask and temperature. Knows no sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweave_ray.outputs import TokenLogprobs

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
        entries += _entries(logits[rows], token_ids[rows], num_top[rows])
    return entries


def _entries(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen: list[float] = logprobs.gather(1, ids)[:, 0].tolist()
    ranks: list[int] = (1 + (logits > logits.gather(1, ids)).sum(dim=-1)).tolist()
    most = min(max(num_top), logits.shape[1])
    tops = _likeliest(logprobs, most) if most else [[] for _ in token_ids]
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(top[:num]))
        for token_id, logprob, rank, top, num in zip(
            token_ids, chosen, ranks, tops, num_top, strict=True
        )
    ]


def _likeliest(logprobs: Tensor, num: int) -> list[list[tuple[int, float]]]:
    values, ids = logprobs.topk(num, dim=-1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        sorted(zip(row_ids, row, strict=True), key=lambda pair: (-pair[1], pair[0]))
        for row_ids, row in pairs
    ]
