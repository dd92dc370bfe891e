"""Deadlines in the engine: who is ended, when, and that nothing of them is left."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer
from tests.engine.test_async_engine import LIMITS, SlowRunner, check, running, until
from tests.engine.test_scheduler import make_request, run
from torchweave_ray.config import CacheConfig, SchedulerConfig, StepCost
from torchweave_ray.deadline import Deadline, Late
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.errors import DeadlineExceeded
from torchweave_ray.outputs import FinishReason, GenerateRequest, RequestOutput

COST = StepCost(a=2.0, b=1.0, c=0.0)
"""1,000 tokens take a second and a little."""


class Timed:
    """An engine whose time stands still unless it is told."""

    def __init__(self, step_depth: int = 0, **scheduler: object) -> None:
        self.now = 100.0
        limits = RuntimeLimits(1024, 16, 8192, VOCAB, (EOS,), step_depth)
        self.runner = EchoRunner(limits)
        self.engine = Engine(
            self.runner,
            LetterDetokenizer(),
            CacheConfig(),
            SchedulerConfig(**scheduler),  # type: ignore[arg-type]
            "artifact",
            lambda: self.now,
        )

    def is_free(self) -> bool:
        stats = self.engine.stats()
        return stats.num_free_blocks == stats.num_blocks and stats.num_waiting_tokens == 0


def the_end(output: RequestOutput) -> tuple[FinishReason | None, str | None]:
    assert output.is_last
    return output.deltas[-1].finish_reason, output.deltas[-1].error


def test_in_the_queue() -> None:
    timed = Timed(max_num_seqs=1)
    timed.engine.add(make_request("occupant", 20, max_tokens=50))
    timed.engine.step()
    timed.engine.add(make_request("late", 500, deadline=105.0))
    timed.engine.step()
    assert timed.engine.stats().num_waiting_tokens == 500
    timed.now = 105.0
    late = next(o for o in timed.engine.step() if o.request_id == "late")
    assert the_end(late) == (FinishReason.ERROR, Late.PASSED)
    assert timed.engine.stats().num_waiting == timed.engine.stats().num_waiting_tokens == 0
    assert list(run(timed.engine)) == ["occupant"]
    assert timed.is_free()


@pytest.mark.parametrize("step_depth", [0, 1])
@pytest.mark.parametrize("n", [1, 3])
def test_in_its_prompt_and_in_its_answer(step_depth: int, n: int) -> None:
    for num_steps in (1, 2, 6):
        timed = Timed(step_depth, max_num_batched_tokens=64)
        timed.engine.add(make_request("late", 200, max_tokens=100, n=n, deadline=105.0))
        outputs = [output for _ in range(num_steps) for output in timed.engine.step()]
        timed.now = 105.5
        while timed.engine.has_work:
            outputs += timed.engine.step()
            timed.engine.check_integrity()
        ended = {d.index: d for o in outputs for d in o.deltas if d.finish_reason}
        assert [ended[i].error for i in range(n)] == [Late.PASSED] * n
        assert outputs[-1].is_last
        assert any(d.token_ids for o in outputs for d in o.deltas) == (num_steps == 6)
        assert timed.is_free()


def test_a_prompt_that_cannot_be_computed_in_time_is_not_begun() -> None:
    timed = Timed(step_cost=COST)
    timed.engine.add(make_request("hopeless", 2000, deadline=101.0))
    timed.engine.add(make_request("possible", 400, deadline=101.0))
    (hopeless,) = timed.engine.step()
    assert hopeless.request_id == "hopeless"
    assert the_end(hopeless) == (FinishReason.ERROR, Late.HOPELESS)
    scheduled = {s.num_prompt_tokens for plan in timed.runner.plans for s in plan.sequences}
    assert scheduled == {400}
    assert the_end(run(timed.engine)["possible"][-1]) == (FinishReason.LENGTH, None)
    assert timed.is_free()


def test_one_begun_is_given_up_as_soon_as_the_rest_cannot_be_computed() -> None:
    timed = Timed(step_cost=COST, max_num_batched_tokens=100)
    timed.engine.add(make_request("r", 2000, deadline=103.0))
    timed.engine.step()
    left = timed.engine.stats().num_waiting_tokens
    assert 1500 < left < 2000
    timed.now = 102.0  # something held it up: a second is left for what takes longer
    (output,) = timed.engine.step()
    assert the_end(output) == (FinishReason.ERROR, Late.HOPELESS)
    assert timed.is_free()


def test_without_costs_only_the_clock_counts() -> None:
    timed = Timed()
    timed.engine.add(make_request("r", 8000, max_tokens=4, deadline=100.001))
    assert the_end(run(timed.engine)["r"][-1]) == (FinishReason.LENGTH, None)


def test_what_is_cached_needs_no_time() -> None:
    timed = Timed(step_cost=COST, max_num_seqs=1)
    request = make_request("first", 2000)
    timed.engine.add(make_request("occupant", 20, max_tokens=5))
    timed.engine.step()
    timed.engine.add(replace(request, request_id="second", deadline=104.0))
    assert timed.engine.stats().num_waiting_tokens == 2000, "nothing of it is cached yet"
    timed.engine.abort("occupant")
    timed.engine.add(replace(request, request_id="zeroth", priority=1))
    outputs = []
    while not any(o.request_id == "zeroth" and o.is_last for o in outputs):
        outputs += timed.engine.step()
    timed.now = 103.5  # half a second: too little for 2,000 tokens, enough for the last 16
    assert the_end(run(timed.engine)["second"][-1]) == (FinishReason.LENGTH, None)
    assert timed.engine.stats().num_prefix_hit_tokens == 1984


def test_one_that_streams_goes_on_to_its_deadline() -> None:
    """A preempted stream has a long way back; it is not ended for that before its time."""
    timed = Timed(step_cost=COST)
    timed.engine.add(make_request("r", 2000, max_tokens=50, deadline=110.0))
    while not timed.engine.step():
        pass
    timed.now = 109.99
    (seq,) = timed.engine._scheduler.running
    timed.engine._scheduler.preempt(seq)
    outputs = [timed.engine.step() for _ in range(3)]
    assert not any(o.is_last for each in outputs for o in each)
    timed.now = 110.0
    (output,) = timed.engine.step()
    assert the_end(output) == (FinishReason.ERROR, Late.PASSED)
    assert timed.is_free()


def test_on_the_loop_it_is_a_refusal_before_the_first_token_and_an_end_after_it() -> None:
    async def body() -> None:
        async with running(SlowRunner(LIMITS), max_num_seqs=1) as engine:
            streaming = make_request("streaming", 20, max_tokens=7000, deadline=Deadline.after(0.3))
            outputs = engine.generate(streaming)
            seen = [await anext(outputs)]
            queued = make_request("queued", 20, deadline=Deadline.after(0.05))
            with pytest.raises(DeadlineExceeded, match="the deadline passed"):
                await anext(engine.generate(queued))
            seen += [output async for output in outputs]
            assert the_end(seen[-1]) == (FinishReason.ERROR, Late.PASSED)
            assert seen[-1].usage is not None
            assert seen[-1].usage.completion_tokens > 0
            await until(lambda: engine.snapshot().num_free_blocks == LIMITS.num_blocks)

    check(body)


def test_between_machines_a_deadline_is_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = make_request("r", 4, deadline=Deadline.after(60.0))
    sent = pickle.dumps(request)
    here = pickle.loads(sent)
    assert type(here.deadline) is Deadline
    assert here.deadline == pytest.approx(request.deadline, abs=1.0)
    now = 5_000_000.0
    monkeypatch.setattr("torchweave_ray.deadline.time.monotonic", lambda: now)
    there: GenerateRequest = pickle.loads(sent)
    assert there.deadline is not None
    assert there.deadline == pytest.approx(now + 60.0, abs=1.0)
    assert replace(there, deadline=None) == replace(request, deadline=None)
