"""AsyncEngine on EchoRunner: threads, streams, aborts, drain, death."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer, expected
from tests.engine.test_scheduler import make_request
from torchweave_ray.config import CacheConfig, SchedulerConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import PendingStep, RuntimeLimits, StepPlan
from torchweave_ray.errors import ConfigError, EngineDead, InvalidRequest, Overloaded, Unavailable
from torchweave_ray.outputs import ModelInfo, RequestOutput

LIMITS = RuntimeLimits(512, 16, 8000, VOCAB, (EOS,))
INFO = ModelInfo(
    *("echo", "artifact", "numerics", "Echo", VOCAB, (EOS,)),
    *("cpu", "none", "echo", 8000, 32, 16, "none"),
)


class SlowRunner(EchoRunner):
    """Takes long enough that 7,000 tokens never end before a test looks."""

    def submit(self, plan: StepPlan) -> PendingStep:
        time.sleep(0.001)
        return super().submit(plan)


class FailingRunner(SlowRunner):
    """Fails on demand."""

    fail = False

    def submit(self, plan: StepPlan) -> PendingStep:
        if self.fail:
            raise MemoryError("no memory left")
        return super().submit(plan)


@asynccontextmanager
async def running(
    runner: EchoRunner | None = None,
    after_step: Callable[[], None] | None = None,
    **scheduler: object,
) -> AsyncIterator[AsyncEngine]:
    engine = Engine(
        runner or EchoRunner(LIMITS),
        LetterDetokenizer(),
        CacheConfig(),
        SchedulerConfig(**scheduler),  # type: ignore[arg-type]
        "artifact",
    )
    async_engine = AsyncEngine(engine, INFO, after_step=after_step)
    async_engine.start()
    try:
        yield async_engine
    finally:
        async_engine.close()


async def text_of(engine: AsyncEngine, name: str, **fields: object) -> str:
    request = make_request(name, 30, max_tokens=20, **fields)
    return "".join([d.text async for o in engine.generate(request) for d in o.deltas])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def check(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_many_streams_at_once_give_each_its_own_text() -> None:
    async def body() -> None:
        async with running() as engine:
            texts = await asyncio.gather(*(text_of(engine, f"r{i}") for i in range(40)))
            for i, text in enumerate(texts):
                request = make_request(f"r{i}", 30, max_tokens=20)
                assert text == expected(request, 0, LIMITS.max_model_len).text

    check(body)


def test_leaving_early_frees_everything() -> None:
    async def body() -> None:
        async with running(SlowRunner(LIMITS)) as engine:
            request = make_request("long", 100, max_tokens=7000)
            async with aclosing(engine.generate(request)) as outputs:
                async for _ in outputs:
                    break
            await until(lambda: engine.snapshot().num_free_blocks == LIMITS.num_blocks)
            assert engine.snapshot().num_running == 0

    check(body)


def test_outputs_of_a_step_reach_the_loop_together() -> None:
    async def body() -> None:
        seen: list[str] = []
        async with running(after_step=lambda: seen.append("|")) as engine:
            done = asyncio.Event()

            def sink(output: object) -> None:
                assert isinstance(output, RequestOutput)
                seen.append(output.request_id)
                if output.is_last and seen.count("|") >= 3:
                    done.set()

            for name in "ab":
                engine.add(make_request(name, 30, max_tokens=5), sink)
            await done.wait()
            await asyncio.sleep(0.01)
        steps = "".join(seen).split("|")
        assert sum(len(step) == 2 for step in steps) >= 3

    check(body)


def test_a_full_queue_refuses_while_a_step_runs() -> None:
    """As long as it takes; what the look is not sure of waits for its end."""

    class HeldRunner(EchoRunner):
        def submit(self, plan: StepPlan) -> PendingStep:
            assert may_step.acquire(timeout=20)
            return super().submit(plan)

    may_step = threading.Semaphore(0)

    async def body() -> None:
        limits = {"max_waiting_tokens": 200, "max_num_seqs": 1, "max_num_batched_tokens": 64}
        async with running(HeldRunner(LIMITS), **limits) as engine:
            first, second, third, fourth = (
                replace(make_request(name, num, max_tokens=1), artifact_id="artifact")
                for name, num in (("a", 150), ("b", 100), ("c", 150), ("d", 150))
            )
            sinks: list[object] = []
            engine.add(first, sinks.append)
            await until(lambda: engine.snapshot().num_running == 1)
            engine.add(second, sinks.append)  # for the inbox: a step is running
            with pytest.raises(Overloaded, match="186 prompt tokens are waiting"):
                engine.add(third, sinks.append)  # and what is in the inbox counts
            may_step.release()
            await until(lambda: engine.snapshot().num_waiting_tokens == 100 + 22)
            with pytest.raises(Overloaded, match="122 prompt tokens are waiting"):
                engine.add(third, sinks.append)
            assert not sinks, "and nobody else has heard anything: the step still runs"
            engine.add(replace(fourth, tenant="another"), sinks.append)  # it has a share
            may_step.release(100)
            await until(lambda: len(sinks) == 3)

    check(body)


def test_refusals_come_before_the_first_output() -> None:
    async def body() -> None:
        runner = SlowRunner(LIMITS)
        async with running(runner, max_waiting_tokens=200, max_num_seqs=1) as engine:
            with pytest.raises(InvalidRequest):
                await anext(engine.generate(make_request("r", 0)))
            first = engine.generate(make_request("first", 150, max_tokens=7000))
            await anext(first)
            second = asyncio.ensure_future(anext(engine.generate(make_request("second", 150))))
            await until(lambda: engine.snapshot().num_waiting_tokens == 150)
            with pytest.raises(Overloaded) as caught:
                await anext(engine.generate(make_request("third", 100)))
            assert caught.value.retry_after is not None
            assert caught.value.retry_after >= 0.25
            with pytest.raises(InvalidRequest, match="in use"):
                await anext(engine.generate(make_request("first", 30)))
            second.cancel()
            await first.aclose()  # type: ignore[attr-defined]

    check(body)


def test_a_failing_runner_ends_every_stream_and_the_health() -> None:
    async def body() -> None:
        runner = FailingRunner(LIMITS)
        async with running(runner) as engine:
            stream = engine.generate(make_request("r", 30, max_tokens=7000))
            await anext(stream)
            engine.check_health()
            runner.fail = True
            with pytest.raises(EngineDead, match="no memory left"):
                async for _ in stream:
                    pass
            with pytest.raises(EngineDead):
                engine.check_health()
            with pytest.raises(EngineDead):
                await anext(engine.generate(make_request("late", 30)))

    check(body)


def test_drain_waits_for_streams_and_refuses_new_ones() -> None:
    async def body() -> None:
        async with running() as engine:
            stream = asyncio.ensure_future(text_of(engine, "r"))
            await asyncio.sleep(0)
            draining = asyncio.ensure_future(engine.drain(20))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable):
                await anext(engine.generate(make_request("late", 30)))
            assert await draining
            request = make_request("r", 30, max_tokens=20)
            assert await stream == expected(request, 0, LIMITS.max_model_len).text

    check(body)


def test_drain_aborts_what_outlives_the_limit() -> None:
    async def body() -> None:
        async with running(SlowRunner(LIMITS)) as engine:
            stream = engine.generate(make_request("r", 30, max_tokens=7000))
            await anext(stream)
            assert not await engine.drain(0.01)
            reasons = [d.finish_reason async for o in stream for d in o.deltas]
            assert reasons[-1] == "abort"

    check(body)


def test_limits_change_in_place_within_capacity() -> None:
    async def body() -> None:
        async with running(max_num_seqs=4) as engine:
            engine.update_limits(max_num_seqs=1)
            engine.update_limits(max_num_seqs=1)
            peak = 0

            def sink(_: object) -> None:
                nonlocal peak
                peak = max(peak, engine.snapshot().num_running)

            for i in range(4):
                engine.add(make_request(f"r{i}", 30), sink)
            await until(lambda: engine.snapshot().num_finished == 4)
            assert peak <= 1
            with pytest.raises(ConfigError, match="capacity of 4"):
                engine.update_limits(max_num_seqs=5)
            with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
                engine.update_limits(max_num_seq=1)

    check(body)


def test_an_idle_scheduler_waits_for_more_arrivals_when_asked_to() -> None:
    async def body() -> None:
        runner = EchoRunner(LIMITS)
        async with running(runner, schedule_tick_ms=200.0) as engine:
            await asyncio.sleep(0.01)
            first = asyncio.ensure_future(text_of(engine, "first"))
            await asyncio.sleep(0.05)
            second = asyncio.ensure_future(text_of(engine, "second"))
            await asyncio.gather(first, second)
        assert len(runner.plans[0].sequences) == 2

    check(body)


def test_a_resumed_request_goes_on() -> None:
    async def body() -> None:
        async with running() as engine:
            request = make_request("r", 30, max_tokens=20)
            whole = expected(request, 0, LIMITS.max_model_len)
            resumed = replace(
                request,
                output_token_ids=tuple(whole.token_ids[:7]),
                emitted_chars=whole.released[6],
            )
            rest = "".join([d.text async for o in engine.generate(resumed) for d in o.deltas])
            assert whole.text[: whole.released[6]] + rest == whole.text

    check(body)
