"""Filters and logits on which every sampler must agree with its twin. No test in here."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweave_ray.sampling_params import SamplingParams


def params_of(vocab: int) -> list[SamplingParams]:
    """Greedy first, all filters at once last."""
    return [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=2.5, top_k=40),
        SamplingParams(top_k=1),
        SamplingParams(top_k=vocab - 1),
        SamplingParams(top_k=vocab + 5),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=1e-9),
        SamplingParams(temperature=100.0, top_p=0.97),
        SamplingParams(min_p=0.1),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1.3, top_k=100, top_p=0.8, min_p=0.02),
    ]


def logits_of(num_rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Ties everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab, generator=generator) * 3 * 8).round() / 8


def rows_without_a_draw(vocab: int) -> Tensor:
    """Behind one that has a draw: not finite, nothing allowed; at last a single token is."""
    logits = logits_of(6, vocab, seed=1)
    logits[1, 7] = torch.nan
    logits[2, vocab - 1] = torch.nan
    logits[3, 5] = torch.inf
    logits[4] = -torch.inf
    logits[5, :-1] = -torch.inf
    return logits
