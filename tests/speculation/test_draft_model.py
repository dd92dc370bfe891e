"""A drafter with a model of its own: its KV follows the sequences', whatever becomes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer, Unsure, expected
from torchweave_ray.config import CacheConfig, SchedulerConfig, SpeculationConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits, StepPlan
from torchweave_ray.engine.speculation.draft_model import DraftModel
from torchweave_ray.engine.speculation.drafter import Drafter
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams

LIMITS = RuntimeLimits(60, 4, 200, VOCAB, (EOS,))
CACHE = CacheConfig(block_size=4)
CONFIG = SpeculationConfig(method="draft", model="small", max_draft_tokens=5)


class Timed:
    """An engine whose clock only its runners advance."""

    def __init__(
        self,
        doubt: float = 0.0,
        limits: RuntimeLimits = LIMITS,
        small: RuntimeLimits = LIMITS,
        row_s: float = 0.0,
        small_s: float = 0.0,
        max_num_seqs: int = 16,
    ) -> None:
        self.now = 0.0
        self.runner, self.small = EchoRunner(limits), Unsure(small, doubt)
        self._slow_down(self.runner, 0.010, row_s)
        self._slow_down(self.small, small_s, small_s / 50)
        self.proposer = DraftModel(self.small, CACHE, VOCAB, 0.1, lambda: self.now)
        self.drafter = Drafter(self.proposer, CONFIG, lambda: self.now)
        config = SchedulerConfig(max_num_seqs=max_num_seqs)
        self.engine = Engine(
            *(self.runner, LetterDetokenizer(), CACHE, config, "a", lambda: self.now),
            drafter=self.drafter,
        )
        self.tokens: dict[str, list[int]] = {}

    def _slow_down(self, runner: EchoRunner, step_s: float, row_s: float) -> None:
        submit = runner.submit

        def timed(plan: StepPlan):
            self.now += step_s + row_s * plan.num_tokens
            return submit(plan)

        runner.submit = timed

    def add(self, name: str, num_prompt: int = 8, max_tokens: int = 60, **options) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=len(name), **options)
        prompt = tuple(1 + i % (VOCAB - 1) for i in range(num_prompt))
        self.tokens[name] = []
        self.engine.add(GenerateRequest(name, "echo", prompt, sampling))

    def step(self, num: int = 1) -> None:
        for _ in range(num):
            for output in self.engine.step():
                for delta in output.deltas:
                    self.tokens[output.request_id] += delta.token_ids
            self.engine.check_integrity()
            running = {seq.seq_id for seq in self.engine._scheduler.running}
            self.proposer.check_integrity(running | set(self.engine._scheduler.released))

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()
        self.step()
        self.proposer.check_integrity(())
        assert self.proposer._blocks.num_free_blocks == self.small.limits.num_blocks

    def alone(self, name: str, **options) -> list[int]:
        other = Timed()
        other.add(name, **options)
        (state,) = other.engine._states.values()
        return expected(state.request, 0, LIMITS.max_model_len).token_ids


def test_a_twin_of_the_model_is_always_right() -> None:
    """It never loses a token of its KV: any that it had wrong would make it draw another one."""
    timed = Timed()
    for name in ("a", "bb", "ccc"):
        timed.add(name, num_prompt=30)
    timed.finish()
    stats = timed.engine.stats()
    assert stats.num_draft_tokens == stats.num_accepted_tokens > 100
    assert stats.num_steps < 60
    for name in ("a", "bb", "ccc"):
        assert timed.tokens[name] == timed.alone(name, num_prompt=30)


@pytest.mark.parametrize("doubt", [0.1, 0.5])
def test_only_its_own_mistakes_are_rejected(doubt: float) -> None:
    timed = Timed(doubt)
    rejected = 0
    note = timed.drafter.note

    def counted(seq, num_drafts: int, num_accepted: int) -> None:
        nonlocal rejected
        rejected += num_accepted < num_drafts
        note(seq, num_drafts, num_accepted)

    timed.drafter.note = counted
    for name in ("a", "bb", "ccc", "dddd"):
        timed.add(name, num_prompt=9)
        timed.step(5)
    timed.finish()
    assert 0 < rejected <= timed.small.num_wrong
    for name in ("a", "bb", "ccc", "dddd"):
        assert timed.tokens[name] == timed.alone(name, num_prompt=9)


def test_preemption_and_aborts_free_what_it_holds() -> None:
    tight = replace(LIMITS, num_blocks=22)
    timed = Timed(0.1, limits=tight, small=tight)
    for name in ("a", "bb", "ccc", "dddd"):
        timed.add(name, num_prompt=12)
    timed.step(6)
    timed.engine.abort("bb")
    timed.finish()
    assert timed.engine.stats().num_preemptions > 0
    for name in ("a", "ccc", "dddd"):
        assert timed.tokens[name] == timed.alone(name, num_prompt=12)


def test_a_small_cache_only_means_fewer_drafts() -> None:
    timed = Timed(small=replace(LIMITS, num_blocks=14, max_model_len=50))
    for name in ("a", "bb", "ccc"):
        timed.add(name, num_prompt=20)
    timed.finish()
    assert timed.engine.stats().num_accepted_tokens > 10
    for name in ("a", "bb", "ccc"):
        assert timed.tokens[name] == timed.alone(name, num_prompt=20)


def test_a_prompt_that_it_knows_is_not_computed_again() -> None:
    def num_computed(timed: Timed) -> int:
        return sum(plan.num_tokens for plan in timed.small.plans)

    timed = Timed()
    timed.add("a", num_prompt=80)
    timed.finish()
    first = num_computed(timed)
    timed.add("b", num_prompt=80)
    timed.finish()
    assert first > 80
    assert num_computed(timed) - first < first - 70
    assert timed.tokens["b"] == timed.tokens["a"]


def test_tokens_that_only_one_of_the_models_has() -> None:
    """Padding makes vocabularies of one tokenizer differ in length."""
    larger = Timed(small=replace(LIMITS, vocab_size=VOCAB + 8))
    larger.proposer._vocab_size = 20  # as if the served model had half of what the small one draws
    larger.add("a")
    larger.finish()
    drafted = {t for p in larger.runner.plans for s in p.sequences for t in s.draft_token_ids}
    assert drafted
    assert max(drafted) < 20
    smaller = Timed(small=replace(LIMITS, vocab_size=30))
    smaller.add("a", num_prompt=35)  # has a token that the small model lacks
    smaller.add("bb", num_prompt=5, logit_bias={35: 1.0})
    smaller.finish()
    assert smaller.engine.stats().num_draft_tokens == 0
    assert not smaller.small.plans


@pytest.mark.parametrize(
    ("row_s", "small_s", "has_drafts"),
    [(0.0, 0.0, True), (0.0001, 0.001, True), (0.02, 0.001, False), (0.0001, 0.05, False)],
)
def test_it_drafts_only_where_that_saves_time(
    row_s: float, small_s: float, has_drafts: bool
) -> None:
    """Drafts are nearly free, or rows cost most of the step, or the small model is not fast."""
    large = replace(LIMITS, num_blocks=400)
    timed = Timed(0.2, large, large, row_s, small_s)
    for i in range(8):
        timed.add("r" * (i + 1), max_tokens=150)
    timed.step(12)
    before = len(timed.small.plans)
    timed.step(12)
    num = len(timed.small.plans) - before
    assert num >= 24 if has_drafts else num == 0


def test_a_prompt_is_read_only_where_enough_of_the_text_is_left() -> None:
    for max_tokens, is_read in ((20, False), (150, True)):
        large = replace(LIMITS, num_blocks=400, max_model_len=2000)
        timed = Timed(0.0, large, large, row_s=0.0002, small_s=0.004)
        timed.drafter._guess_times.note(1, 1000, 1.0, 0.01)  # 1 ms a token of a prompt
        timed.add("a", num_prompt=150, max_tokens=max_tokens)
        timed.finish()
        assert bool(timed.small.plans) == is_read
