"""The sampler against its definition, written once more as a plain loop over one row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.sampling_case import logits_of, params_of
from torchweave_ray.runner.sampler import NO_TOKEN, Draw, draw, sample
from torchweave_ray.runner.sampling.philox import philox4x32, uniforms
from torchweave_ray.sampling_params import SamplingParams

VOCAB = 640
PARAMS = params_of(VOCAB)


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = philox4x32(
        np.array([_words(counter)] * 2, dtype=np.uint64).T,
        np.array([_words(key)] * 2, dtype=np.uint64).T,
    )
    assert words.T.tolist() == [_words(expected)] * 2


def test_a_uniform_depends_on_its_own_seed_and_index_only() -> None:
    seeds = np.array([0, 1, 2**63 - 1, 1 << 32, 0], dtype=np.uint64)
    indices = np.array([0, 0, 7, 0, 1], dtype=np.uint64)
    together = uniforms(seeds, indices)
    alone = [float(uniforms(seeds[i : i + 1], indices[i : i + 1])[0]) for i in range(5)]
    assert together.tolist() == alone
    assert len(set(alone)) == 5
    assert alone[0] == ((0x6627E8D5E169C58D >> 11) + 0.5) * 2.0**-53


def _reference(row: Tensor, p: SamplingParams, u: float) -> int:
    """The definition in sampler.py's docstring, token by token; exp is torch's own."""
    logits = row.tolist()
    l_max = max(logits)
    if p.is_greedy:
        return logits.index(l_max)
    w: list[float] = torch.exp((row - row.max()) / torch.tensor(p.temperature)).tolist()
    if 0 < p.top_k < len(w):
        kth = sorted(logits, reverse=True)[p.top_k - 1]
        w = [x if value >= kth else 0.0 for x, value in zip(w, logits, strict=True)]
    if p.top_p < 1.0:
        target = p.top_p * _last_sum(w)
        ordered = sorted(w, reverse=True)
        above = {x: _last_sum(ordered[: ordered.index(x)]) for x in set(w)}
        w = [x if above[x] < target else 0.0 for x in w]
    floor = torch.tensor(p.min_p).item()
    w = [x if x >= floor else 0.0 for x in w]
    target, total = u * _last_sum(w), 0.0
    for token_id, x in enumerate(w):
        total += x
        if total > target:
            return token_id
    return max(i for i, x in enumerate(w) if x > 0)


def _last_sum(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


def _uniform(draw: Draw) -> float:
    seed, index = np.uint64(draw.seed), np.uint64(draw.output_index)
    return float(uniforms(np.array([seed]), np.array([index]))[0])


def test_draws_equal_the_definition_in_a_mixed_batch() -> None:
    for trial in range(8):
        draws = [Draw(p, 1000 * trial + i, trial) for i, p in enumerate(PARAMS)]
        logits = logits_of(len(draws), VOCAB, seed=trial)
        expected = [_reference(logits[i], d.sampling, _uniform(d)) for i, d in enumerate(draws)]
        assert sample(logits, draws) == expected


def test_a_row_draws_the_same_alone_and_in_a_crowd() -> None:
    draws = [Draw(p, i, 3) for i, p in enumerate(PARAMS * 4)]
    logits = logits_of(len(draws), VOCAB, seed=5)
    alone = [sample(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    assert sample(logits, draws) == alone
    order = list(reversed(range(len(draws))))
    assert sample(logits[order], [draws[i] for i in order]) == [alone[i] for i in order]


def test_top_p_is_the_same_however_many_tokens_it_has_to_look_at() -> None:
    """A flat row is decided by the whole sort, a peaked one by the first 256 tokens."""
    flat, peaked = torch.zeros(VOCAB), torch.zeros(VOCAB)
    flat[::2] = 0.001
    peaked[7] = 40.0
    draws = [Draw(SamplingParams(top_p=0.45), seed, 0) for seed in range(64)]
    drawn = sample(flat.repeat(64, 1), draws)
    assert {token_id % 2 for token_id in drawn} == {0}
    assert drawn == [_reference(flat, d.sampling, _uniform(d)) for d in draws]
    assert set(sample(peaked.repeat(64, 1), draws)) == {7}


def _draw_at(logits: Tensor, u: float, top_p: float = 1.0) -> int:
    uniform = torch.tensor([u], dtype=torch.float64)
    row = logits[None]
    return int(draw(row, row.amax(-1), torch.ones(1), [0], [top_p], [0.0], uniform))


def test_boundaries_belong_to_the_token_behind_them() -> None:
    equal = torch.zeros(4)  # cumulative 1, 2, 3, 4
    assert [_draw_at(equal, u) for u in (0.0, 0.25, 0.5, 0.7499, 0.75, 1.0)] == [0, 1, 2, 2, 3, 3]
    assert _draw_at(torch.tensor([-torch.inf, 0.0, -torch.inf]), 1.0) == 1


def test_top_p_stops_where_the_likelier_tokens_hold_just_that_share() -> None:
    for gap in range(1, 100):
        logits = torch.tensor([0.0, -gap / 50])
        total = 1.0 + torch.exp(logits)[1].double().item()
        share = 1.0 / total
        if share * total == 1.0:
            assert _draw_at(logits, 0.999, top_p=share) == 0
            assert _draw_at(logits, 0.999, top_p=math.nextafter(share, 1) + 1e-12) == 1
            return
    raise AssertionError("no share is exact")


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [9, 4, 500]] = 2.0
    logits[1] = -torch.inf
    logits[1, 33] = -1e30
    assert sample(logits, [Draw(SamplingParams(temperature=0.0), 0, 0)] * 2) == [4, 33]


@pytest.mark.parametrize("temperature", [1e-30, 5e-324, 1e-6])
def test_a_tiny_temperature_is_greedy_not_nan(temperature: float) -> None:
    logits = logits_of(4, VOCAB) + torch.linspace(0, 1e-3, VOCAB)
    draws = [Draw(SamplingParams(temperature=temperature), i, 0) for i in range(4)]
    assert sample(logits, draws) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, "nothing allowed"])
@pytest.mark.parametrize("params", PARAMS)
def test_a_row_without_a_draw_leaves_the_others_alone(
    bad: float | str, params: SamplingParams
) -> None:
    draws = [Draw(params, i, 0) for i in range(3)]
    logits = logits_of(3, VOCAB)
    expected = sample(logits, draws)
    if isinstance(bad, str):
        logits[1] = -torch.inf
    else:
        logits[1, 17] = bad
    assert sample(logits, draws) == [expected[0], NO_TOKEN, expected[2]]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = logits_of(1, VOCAB).repeat(200, 1)
    logits[:, 5:] = -torch.inf
    draws = [Draw(SamplingParams(temperature=50.0), seed, 0) for seed in range(200)]
    assert set(sample(logits, draws)) == set(range(5))


def test_frequencies_follow_the_softmax() -> None:
    """Chi-square over fixed seeds: deterministic, the bound is p = 0.001 at 7 degrees."""
    row = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0, 0.25, -0.5, 1.5])
    num = 20_000
    draws = [Draw(SamplingParams(), seed, 0) for seed in range(num)]
    observed = np.bincount(sample(row.repeat(num, 1), draws), minlength=8)
    expected = torch.softmax(row.double(), dim=0).numpy() * num
    assert float(((observed - expected) ** 2 / expected).sum()) < 24.3
