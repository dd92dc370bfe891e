"""The Triton sampler draws what its twin draws: filters, ties, and rows without a draw."""

from __future__ import annotations

import pytest
import torch

from tests.sampling_case import logits_of, params_of, rows_without_a_draw
from torchweave_ray.runner.sampler import NO_TOKEN, NOTHING_ALLOWED, Draw, sample
from torchweave_ray.sampling_params import SamplingParams

pytest.importorskip("triton", reason="triton, the language of the kernels, is not installed")
from torchweave_ray.runner.sampling.triton import TritonSampler

VOCAB = 5000
"""More than a block of ids."""
PARAMS = params_of(VOCAB)


def test_draws_are_those_of_the_twin(device: torch.device) -> None:
    draws = [Draw(p, 1000 + i, 7) for i, p in enumerate(PARAMS)]
    logits = logits_of(len(draws), VOCAB, 3)
    drawn = TritonSampler()(logits.to(device), draws)
    assert drawn.tolist() == sample(logits, draws)
    assert TritonSampler()(logits[:0].to(device), []).tolist() == []


@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[-1]])
def test_rows_without_a_draw(device: torch.device, params: SamplingParams) -> None:
    logits = rows_without_a_draw(VOCAB)
    draws = [Draw(params, i, 0) for i in range(6)]
    drawn = TritonSampler()(logits.to(device), draws).tolist()
    assert drawn[0] == sample(logits[:1], draws[:1])[0]
    assert drawn[1:] == [NO_TOKEN] * 3 + [NOTHING_ALLOWED, VOCAB - 1]


def test_zeros_of_both_signs_tie(device: torch.device) -> None:
    logits = torch.full((1, 40), -9.0)
    logits[0, 3], logits[0, 30] = -0.0, 0.0
    draws = [[Draw(SamplingParams(top_k=1), seed, 0)] for seed in range(5)]
    drawn = [TritonSampler()(logits.to(device), each).tolist() for each in draws]
    assert drawn == [sample(logits, each) for each in draws]
    assert {3, 30} == {ids[0] for ids in drawn}
