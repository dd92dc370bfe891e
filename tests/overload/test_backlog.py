"""The backlog is exact, against a recount by brute force; refusals say when to come again."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer
from tests.engine.test_async_engine import SlowRunner, check, running, until
from tests.engine.test_scheduler import make_engine, make_request, run
from tests.properties.test_engine_properties import Workload
from torchweave_ray.block_hash import group_hash, hash_blocks, root_hash
from torchweave_ray.config import CacheConfig, SchedulerConfig, StepCost
from torchweave_ray.engine.admission import PromptPace
from torchweave_ray.engine.budget import prompt_tokens_per_s
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.errors import Overloaded
from torchweave_ray.outputs import GenerateRequest, OutputKind


def cached_tokens(engine: Engine, request: GenerateRequest, token_ids: list[int]) -> int:
    """Of the prefix that the cache has, by hashes made anew; one token is always computed."""
    blocks = engine._scheduler.blocks
    if not blocks._enable_prefix_caching or request.exclusive:
        return 0
    groups = engine.limits.groups
    root = root_hash("artifact", request.tenant, request.cache_salt)
    hashes = hash_blocks(root, token_ids[:-1], blocks.block_size)

    def is_whole(num: int) -> bool:
        return all(
            group_hash(each, group) in blocks._pool._by_hash
            for group in range(groups.num)
            for each in hashes[groups.num_dropped(num) if group >= groups.num_full else 0 : num]
        )

    longest = next(num for num in range(len(hashes), -1, -1) if is_whole(num))
    return longest * blocks.block_size


def recount(engine: Engine, tenant: str | None = None) -> int:
    scheduler = engine._scheduler
    live = {s.seq_id: s for s in (*scheduler.running, *scheduler.waiting, *scheduler._exclusive)}
    total = 0
    for seq in live.values():
        request, state = seq.state.request, seq.state
        if tenant not in (None, request.tenant):
            continue
        left = len(seq.token_ids) - seq.num_computed_tokens
        source = seq.fork_source
        is_scored = request.output_kind is OutputKind.PROMPT_LOGPROBS and (
            state.needs_prompt_logprobs
        )
        if seq.is_waiting and request.output_kind is not OutputKind.POOLED and not is_scored:
            behind = engine.limits.groups.num_dropped(
                seq.num_prompt_tokens // engine.limits.block_size
            )
            is_whole = source is not None and source.num_dropped_blocks <= behind
            if is_whole and source.num_submitted_tokens >= seq.num_prompt_tokens - 1:
                left -= seq.num_prompt_tokens - 1
            else:
                left -= cached_tokens(engine, request, seq.token_ids)
        total += left if left > 1 or seq.is_waiting else 0
    return total


def wanted_by(engine: Engine, request: GenerateRequest) -> int:
    token_ids = [*request.prompt_token_ids, *request.output_token_ids]
    left = len(token_ids)
    if request.output_kind is OutputKind.TOKENS or len(request.prompt_token_ids) == 1:
        left -= cached_tokens(engine, request, token_ids)
    return left


class BoundedWorkload(Workload):
    """The random workload, with a bound on its backlog and a recount after everything."""

    def run(self) -> None:
        self.limit = self.rng.choice([5, 20, 60, 200])
        self.config = replace(self.config, max_waiting_tokens=self.limit)
        self.engine.update_scheduler_config(self.config)
        self.num_refused = self.num_within_share = self.largest = 0
        arrivals = [(self.rng.randint(0, 12), request) for request in self.requests]
        for tick in range(3000):
            for when, request in arrivals:
                if when == tick:
                    self.offer(request)
            if self.rng.random() < 0.05:
                self.engine.abort(self.rng.choice(self.requests).request_id)
                assert self.recounted() == recount(self.engine)
            self.engine.step()
            assert self.recounted() == recount(self.engine)
            self.engine.check_integrity()
            self.now += 1.0
            if tick > 12 and not self.engine.has_work:
                break
        assert not self.engine.has_work
        assert self.engine.stats().num_waiting_tokens == 0

    def offer(self, request: GenerateRequest) -> None:
        backlog, wanted = recount(self.engine), wanted_by(self.engine, request)
        is_new = not request.output_token_ids
        must_refuse = is_new and backlog > 0 and backlog + wanted > self.limit
        if must_refuse and self.may_have_its_share(request, wanted):
            must_refuse = False
            self.num_within_share += 1
        self.num_refused += must_refuse
        counts = f"{backlog} prompt tokens are waiting, this request adds {wanted}"
        refused = pytest.raises(Overloaded, match=counts)
        with refused if must_refuse else nullcontext():
            self.engine.add(request, is_bounded=True)

    def may_have_its_share(self, request: GenerateRequest, wanted: int) -> bool:
        """Half, when the other tenant has something open."""
        open_tenants = {
            state.request.tenant
            for state in self.engine._states.values()
            if any(not seq.is_finished for seq in state.sequences)
        }
        if not open_tenants - {request.tenant}:
            return False
        own = recount(self.engine, request.tenant)
        return not own or own + wanted <= self.limit / 2

    def recounted(self) -> int:
        backlog = self.engine.admission.backlog()
        self.largest = max(self.largest, backlog)
        return backlog


@pytest.mark.parametrize("batch", range(4))
def test_the_backlog_of_random_workloads_is_what_a_recount_gives(batch: int) -> None:
    refused = preemptions = hits = forks = shares = 0
    for seed in range(batch * 200, (batch + 1) * 200):
        try:
            workload = BoundedWorkload(seed)
            workload.run()
        except Exception as error:
            raise AssertionError(f"workload {seed}: {error!r}") from error
        stats = workload.engine.stats()
        refused += workload.num_refused
        shares += workload.num_within_share
        preemptions += stats.num_preemptions
        hits += stats.num_prefix_hit_tokens
        forks += sum(request.n > 1 for request in workload.requests)
    assert min(refused, preemptions, hits, forks, shares) > 25, "these meet nothing"


def test_what_the_prefix_cache_has_is_no_backlog() -> None:
    engine, runner = make_engine(max_num_seqs=1, max_waiting_tokens=100)
    prompt = make_request("a", 800)
    engine.add(prompt)
    run(engine)
    engine.add(make_request("occupant", 16, max_tokens=500), is_bounded=True)
    engine.step()
    for i in range(6):  # each asks for 800 tokens; 784 of them are cached
        engine.add(replace(prompt, request_id=f"b{i}"), is_bounded=True)
    assert engine.admission.backlog() == engine.stats().num_waiting_tokens == 6 * 16
    with pytest.raises(Overloaded, match="96 prompt tokens are waiting, this request adds 16"):
        engine.add(replace(prompt, request_id="c"), is_bounded=True)
    before = sum(plan.num_tokens for plan in runner.plans)
    engine.abort("occupant")
    run(engine)
    computed = sum(plan.num_tokens for plan in runner.plans) - before
    assert computed == 6 * (16 + 4 - 1), "what the backlog said, and a decode a token after the 1st"


def test_a_prompt_that_is_being_computed_counts_with_what_is_left_of_it() -> None:
    engine, _ = make_engine(max_num_batched_tokens=64)
    engine.add(make_request("long", 1000, n=4))
    assert engine.stats().num_waiting_tokens == 1000, "once for all choices"
    for done in range(64, 1000, 64):
        engine.step()
        assert engine.stats().num_waiting_tokens == 1000 - done
    engine.step()
    assert engine.stats().num_waiting_tokens == 3, "its last token, for each choice that forks"
    run(engine)


def test_prompts_that_are_cached_whole_are_bounded_too() -> None:
    engine, _ = make_engine(max_num_seqs=1, max_waiting_tokens=10)
    engine.add(make_request("occupant", 1, max_tokens=500), is_bounded=True)
    engine.step()
    for i in range(10):
        engine.add(make_request(f"r{i}", 1), is_bounded=True)
    with pytest.raises(Overloaded):
        engine.add(make_request("one more", 1), is_bounded=True)


def test_an_empty_backlog_takes_any_request() -> None:
    engine, _ = make_engine(max_waiting_tokens=10)
    engine.add(make_request("large", 500), is_bounded=True)
    with pytest.raises(Overloaded):
        engine.add(make_request("next", 500), is_bounded=True)
    run(engine)
    engine.add(make_request("again", 500), is_bounded=True)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedRunner(EchoRunner):
    """Each step takes as long as it has tokens, by a clock of our own."""

    def submit(self, plan):  # type: ignore[no-untyped-def]
        self.clock.now += plan.num_tokens / self.tokens_per_s
        return super().submit(plan)


@pytest.mark.parametrize("tokens_per_s", [50.0, 1000.0])
def test_retry_after_is_the_time_that_the_excess_takes(tokens_per_s: float) -> None:
    clock, limits = Clock(), RuntimeLimits(1024, 16, 8192, VOCAB, (EOS,))
    runner = TimedRunner(limits)
    runner.clock, runner.tokens_per_s = clock, tokens_per_s  # type: ignore[attr-defined]
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=100, max_waiting_tokens=5000)
    engine = Engine(runner, LetterDetokenizer(), CacheConfig(), config, "artifact", clock)
    engine.add(make_request("first", 4100), is_bounded=True)
    for _ in range(11):
        engine.step()
    assert engine.admission.backlog() == 3000
    engine.add(make_request("second", 2000), is_bounded=True)
    with pytest.raises(Overloaded) as caught:
        engine.add(make_request("third", 500), is_bounded=True)
    assert caught.value.retry_after == pytest.approx(500 / tokens_per_s)


def test_before_anything_is_measured_the_tuned_costs_say_it() -> None:
    cost = StepCost(a=10.0, b=2.0, c=0.0)
    engine, _ = make_engine(max_waiting_tokens=3000, step_cost=cost)
    engine.add(make_request("first", 3000), is_bounded=True)
    with pytest.raises(Overloaded) as caught:
        engine.add(make_request("second", 2500), is_bounded=True)
    # A step of prompts lasts PROMPT_STEPS lone decodes of 12 ms: 144 ms, of which 10 are its own.
    assert caught.value.retry_after == pytest.approx(2500 / (67 / 0.144))


def test_decodes_slow_the_prompts_that_run_beside_them() -> None:
    config = SchedulerConfig(step_cost=StepCost(a=10.0, b=2.0, c=0.0))
    alone, beside = prompt_tokens_per_s(config, []), prompt_tokens_per_s(config, [100] * 8)
    assert alone is not None
    assert beside is not None
    assert 0 < beside < alone
    assert prompt_tokens_per_s(SchedulerConfig(), []) is None


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = PromptPace()
    pace.note(0.4, 100)
    assert pace.tokens_per_s is None, "too little to go by"
    pace.note(0.2, 0)
    assert pace.tokens_per_s is None, "a step without prompts says nothing of them"
    for _ in range(10):
        pace.note(0.1, 25)
    assert pace.tokens_per_s == pytest.approx(250)
    for _ in range(300):
        pace.note(0.1, 5)
    assert pace.tokens_per_s == pytest.approx(50, rel=0.01)
    for _ in range(300):  # every other step is of decodes only, and no place is free
        pace.note(0.1, 5)
        pace.note(0.1, 0, is_waiting=True)
    assert pace.tokens_per_s == pytest.approx(25, rel=0.02)


def test_requests_that_come_together_are_bounded_together() -> None:
    async def body() -> None:
        async with running(
            SlowRunner(RuntimeLimits(512, 16, 8000, VOCAB, (EOS,))),
            max_waiting_tokens=450,
            max_num_seqs=1,
        ) as engine:
            occupant = engine.generate(make_request("occupant", 20, max_tokens=7000))
            await anext(occupant)
            heard: dict[str, list[object]] = {f"r{i}": [] for i in range(8)}
            for name, items in heard.items():
                engine.add(make_request(name, 100), items.append)
            await until(lambda: sum(map(len, heard.values())) == 4)
            await asyncio.sleep(0.01)
            refused = [name for name, items in heard.items() if items]
            assert refused == ["r4", "r5", "r6", "r7"]
            assert all(type(items[0]) is Overloaded for items in heard.values() if items)
            assert engine.snapshot().num_waiting_tokens == 400
            for name in heard:
                engine.abort(name)
            await until(lambda: engine.snapshot().num_waiting_tokens == 0)
            await occupant.aclose()  # type: ignore[attr-defined]
            assert await engine.drain(5), "a refused request holds nobody up"

    check(body)


def test_the_queue_is_bounded_in_sequences_too() -> None:
    engine, _ = make_engine(max_num_seqs=1, max_waiting_seqs=3)
    for number in range(3):
        engine.add(make_request(f"r{number}", 10), is_bounded=True)
    with pytest.raises(Overloaded, match="3 sequences are waiting, and the limit is 3") as refused:
        engine.add(make_request("r3", 10), is_bounded=True)
    assert refused.value.code == "queue_full"
    other = make_request("other", 10, tenant="b")
    engine.add(other, is_bounded=True)  # within its share, though the queue is another one's
    engine.step()
    engine.step()
    assert engine.stats().num_waiting < 4
