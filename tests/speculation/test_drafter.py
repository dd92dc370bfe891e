"""Guesses from a sequence's own tokens, and how many of them are worth their time."""

from __future__ import annotations

import random

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer
from torchweave_ray.config import CacheConfig, SchedulerConfig, SpeculationConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits, ScheduledSequence
from torchweave_ray.engine.sequence import RequestState, Sequence
from torchweave_ray.engine.speculation.drafter import Drafter, Wanted
from torchweave_ray.engine.speculation.ngram import NgramProposer
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams

CONFIG = SpeculationConfig(max_draft_tokens=8, min_ngram=2, max_ngram=4)


def propose(tokens: list[int], most: int = 8, proposer: NgramProposer | None = None) -> list[int]:
    request = GenerateRequest("r", "", tuple(tokens), SamplingParams())
    seq = Sequence(7, RequestState(request, 0.0), 0, 1000, 0)
    entry = ScheduledSequence(
        7, len(tokens) - 1, 1, seq.token_ids, len(tokens), [], request.sampling, 0
    )
    wanted = Wanted(seq, entry, len(tokens), most, 0)
    return (proposer or NgramProposer(CONFIG)).propose([wanted])[0]


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


def test_it_reads_on_from_where_it_was() -> None:
    rng = random.Random(4)
    proposer = NgramProposer(CONFIG)
    tokens = [rng.randrange(3) for _ in range(60)]
    for end in range(1, 61):
        assert propose(tokens[:end], 4, proposer) == propose(tokens[:end], 4)
    proposer.release(7)
    assert propose([1, 2, 1], 1, proposer) == propose([1, 2, 1], 1)


@pytest.mark.parametrize(("row_s", "has_drafts"), [(0.0, True), (0.02, False)])
def test_a_loaded_server_makes_none(row_s: float, has_drafts: bool) -> None:
    """Eight streams that repeat themselves: drafts are free, or rows are all that costs."""
    limits = RuntimeLimits(400, 4, 400, VOCAB, (EOS,))
    runner, now = EchoRunner(limits), 0.0
    clock = lambda: now  # noqa: E731
    drafter = Drafter(NgramProposer(CONFIG), CONFIG, clock)
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
