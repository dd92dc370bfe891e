"""The ingress's own part: deadlines that survive a failover, readers that stand still."""

from __future__ import annotations

import asyncio

import pytest

from tests.serve.test_resume import Fault, cut, die, request, run, serving, text_of
from torchweave_ray.deadline import Deadline
from torchweave_ray.errors import DeadlineExceeded
from torchweave_ray.outputs import RequestOutput, merge_outputs


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("act", [die, cut], ids=lambda act: act.__name__)
def test_a_request_that_goes_on_elsewhere_keeps_its_deadline(at: int, act: object) -> None:
    async def body() -> None:
        deadline = Deadline.after(60.0)
        async with serving(Fault(act, at)) as (backend, replica):  # type: ignore[arg-type]
            async for _ in backend.generate(request(2, deadline=deadline)):
                pass
            assert len(replica.requests) > 1
            assert {asked.deadline for asked in replica.requests} == {deadline}

    run(body())


def test_a_late_request_is_refused_as_late() -> None:
    late = DeadlineExceeded("the deadline passed", None, "deadline_exceeded")

    async def body() -> None:
        for use_bus in (True, False):
            async with serving(Fault(lambda _: late, 0), use_bus=use_bus) as (backend, replica):
                with pytest.raises(DeadlineExceeded, match="the deadline passed"):
                    await anext(backend.generate(request()))
                assert len(replica.requests) == 1, "nobody else is asked"

    run(body())


def test_a_reader_that_stands_still_stops_nobody_and_gets_the_rest_at_once() -> None:
    async def body() -> None:
        async with serving() as (backend, _):
            still = backend.generate(request())
            seen = [await anext(still)]
            others = [[output async for output in backend.generate(request())] for _ in range(3)]
            await asyncio.sleep(0.05)
            seen += [output async for output in still]
            assert len(seen) <= 3, "all that came meanwhile is one output"
            assert _text(seen) == text_of(5)
            assert all(_text(each) == text_of(5) for each in others)

    run(body())


def _text(outputs: list[RequestOutput]) -> str:
    return "".join(delta.text for delta in merge_outputs(outputs).deltas)
