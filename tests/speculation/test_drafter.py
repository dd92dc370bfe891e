"""Guesses from a sequence's own tokens, and how many of them are worth their time."""

from __future__ import annotations

import random

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer
from torchweave_ray.config import CacheConfig, SchedulerConfig, SpeculationConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.engine.speculation.drafter import Drafter, DraftState, RowCost, _num_worth
from torchweave_ray.engine.speculation.ngram import NgramProposer
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams

CONFIG = SpeculationConfig(max_draft_tokens=8, min_ngram=2, max_ngram=4)


def propose(tokens: list[int], most: int = 8) -> list[int]:
    return NgramProposer(CONFIG).propose(DraftState(), tokens, len(tokens), most)


def by_brute_force(tokens: list[int], most: int) -> list[int]:
    for size in range(CONFIG.max_ngram, CONFIG.min_ngram - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[start : start + size] == tokens[-size:]:
                following = tokens[start + size :][:most]
                return [following[i % len(following)] for i in range(most)]
    return []


def test_what_followed_the_longest_run_of_last_tokens_where_it_stood_last() -> None:
    assert propose([1, 2, 3, 9, 7, 1, 2, 3]) == [9, 7, 1, 2, 3, 9, 7, 1]
    assert propose([5, 6, 1, 5, 6, 2, 5, 6], most=2) == [2, 5]
    assert propose([1, 2, 3, 4, 8, 3, 4, 9, 1, 2, 3, 4], most=1) == [8]
    assert propose([1, 2, 3, 4, 5]) == []
    assert propose([7]) == []


def test_it_equals_a_search_by_brute_force() -> None:
    rng = random.Random(3)
    for _ in range(500):
        # Values whose bytes look like others' when they are not aligned.
        tokens = [rng.choice([0, 1, 256, 257, 65536]) for _ in range(rng.randint(1, 40))]
        assert propose(tokens, most=5) == by_brute_force(tokens, 5), tokens


def test_a_state_reads_on_from_where_it_was() -> None:
    rng = random.Random(4)
    proposer, state = NgramProposer(CONFIG), DraftState()
    tokens = [rng.randrange(3) for _ in range(60)]
    for end in range(1, 61):
        assert proposer.propose(state, tokens, end, 4) == propose(tokens[:end], 4)


def test_drafts_are_worth_it_while_each_gives_more_than_it_costs() -> None:
    assert _num_worth(acceptance=0.5, price=0.0, most=8) == 8
    assert _num_worth(acceptance=0.5, price=0.2, most=8) == 2
    assert _num_worth(acceptance=0.9, price=1.0, most=8) == 0
    assert _num_worth(acceptance=1.0, price=0.99, most=3) == 3
    assert _num_worth(acceptance=0.9, price=0.1, most=-1) == 0


def test_acceptance_follows_the_last_steps_and_fades_back() -> None:
    state = DraftState()
    assert state.acceptance == 0.5
    for _ in range(50):
        state.note(num_drafts=4, num_accepted=4)
    assert state.acceptance > 0.9
    for _ in range(10):
        state.note(num_drafts=4, num_accepted=0)
    assert state.acceptance < 0.7
    for _ in range(200):
        state.fade()
    assert state.acceptance == pytest.approx(0.5, abs=0.02)


def test_the_price_of_a_row_is_the_slope_of_the_last_steps() -> None:
    cost = RowCost()
    assert cost.price(4) is None
    for num_rows in (4, 5, 6, 7) * 20:
        cost.note(num_rows, 0.010 + 0.001 * num_rows)
    assert cost.price(4) == pytest.approx(4 * 0.001 / 0.014)
    for _ in range(2000):
        cost.note(4, 0.014)
    assert cost.price(4) is None, "without drafts nobody knows what they cost"


@pytest.mark.parametrize(("row_s", "has_drafts"), [(0.0, True), (0.02, False)])
def test_a_loaded_server_makes_none(row_s: float, has_drafts: bool) -> None:
    """Eight streams that repeat themselves: drafts are free, or rows are all that costs."""
    limits = RuntimeLimits(400, 4, 400, VOCAB, (EOS,))
    runner, now = EchoRunner(limits), 0.0
    drafter = Drafter(NgramProposer(CONFIG), CONFIG)
    clock = lambda: now  # noqa: E731
    engine = Engine(
        *(runner, LetterDetokenizer(), CacheConfig(block_size=4), SchedulerConfig(), "a", clock),
        drafter=drafter,
    )
    submit = runner.submit

    def timed(plan):
        nonlocal now
        now += 0.001 + row_s * plan.num_tokens
        return submit(plan)

    runner.submit = timed
    for i in range(8):
        sampling = SamplingParams(max_tokens=150, seed=i, ignore_eos=True, allowed_token_ids=(5,))
        engine.add(GenerateRequest(f"r{i}", "echo", tuple([3, 4, 5] * 8), sampling))
    for _ in range(60):
        engine.step()
    drafted = drafter.num_draft_tokens
    for _ in range(30):
        engine.step()
    assert (drafter.num_draft_tokens - drafted > 60) == has_drafts
    engine.check_integrity()
