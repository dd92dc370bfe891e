"""The native draw against its torch twin, which tests/parity holds against the definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.sampling_case import logits_of, params_of, rows_without_a_draw
from torchweave_ray.kernels.library import Library
from torchweave_ray.runner.sampler import NO_TOKEN, Draw, sample
from torchweave_ray.runner.sampling.native import NativeSampler
from torchweave_ray.sampling_params import SamplingParams

VOCAB = 653
PARAMS = params_of(VOCAB)


@pytest.fixture
def sampler(library: Library) -> Iterator[NativeSampler]:
    team = library.create_team(2)
    yield NativeSampler(team)
    team.close()


def test_draws_are_those_of_the_twin(sampler: NativeSampler) -> None:
    for trial in range(20):
        draws = [Draw(p, 1000 * trial + i, trial) for i, p in enumerate(PARAMS)]
        logits = logits_of(len(draws), VOCAB, trial)
        before = logits.clone()
        assert sampler(logits, draws) == sample(before.clone(), draws)
        assert torch.equal(logits, before)


def test_a_large_vocabulary_and_large_seeds(sampler: NativeSampler) -> None:
    draws = [Draw(p, 2**63 - 1 - i, 2**20 + i) for i, p in enumerate(PARAMS)]
    logits = logits_of(len(draws), 49152, 3)
    assert sampler(logits, draws) == sample(logits, draws)


def test_a_row_draws_the_same_alone_and_in_a_crowd(sampler: NativeSampler) -> None:
    draws = [Draw(p, i, 3) for i, p in enumerate(PARAMS * 3)]
    logits = logits_of(len(draws), VOCAB, 5)
    alone = [sampler(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    assert sampler(logits, draws) == alone
    assert sampler(logits[:0], []) == []


@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[1], PARAMS[-1]])
def test_rows_without_a_draw(sampler: NativeSampler, params: SamplingParams) -> None:
    logits = rows_without_a_draw(VOCAB)
    draws = [Draw(params, i, 0) for i in range(6)]
    ids = sampler(logits, draws)
    assert ids == sample(logits, draws)
    assert ids[1:] == [NO_TOKEN] * 4 + [VOCAB - 1]


def test_only_banned_tokens_are_never_drawn(sampler: NativeSampler) -> None:
    logits = logits_of(1, VOCAB, 2)
    logits[0, ::2] = -torch.inf
    for params in PARAMS:
        for index in range(20):
            assert sampler(logits, [Draw(params, 5, index)])[0] % 2 == 1
