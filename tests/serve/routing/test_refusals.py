"""`RayBackend` and replicas without room: one other is tried, and a lost one is not tried again."""

from __future__ import annotations

import pytest

from deployments.calls import EngineFailed, Refused
from tests.serve.test_resume import Fault, Replica, collect, request, run, serving, text_of
from torchweave_ray.errors import Overloaded


def refuses(replica: str, retry_after: float) -> Fault:
    refusal = Overloaded("busy", None, None, retry_after)
    return Fault(lambda _: Refused(refusal, replica), 0)


@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_a_refusal_leads_to_one_other_replica(use_bus: bool) -> None:
    async def body() -> None:
        async with serving(refuses("a", 3.0), use_bus=use_bus) as (backend, replica):
            texts, _ = await collect(backend, request())
            assert texts == {0: text_of(5)}
            hints = [r.routing for r in replica.requests]
            assert [hint.avoid for hint in hints if hint is not None] == [(), ("a",)]
        faults = (refuses("a", 3.0), refuses("b", 2.0))
        async with serving(*faults, use_bus=use_bus) as (backend, replica):
            with pytest.raises(Overloaded) as caught:
                await collect(backend, request())
            assert caught.value.retry_after == 2.0
            assert len(replica.requests) == 2

    run(body())


@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_the_only_replica_is_not_asked_twice(use_bus: bool) -> None:
    async def body() -> None:
        async with serving(refuses("r1", 3.0), use_bus=use_bus) as (backend, replica):
            assert replica.fleet.running() == {"r1"}
            with pytest.raises(Overloaded):
                await collect(backend, request())
            assert len(replica.requests) == 1

    run(body())


def test_a_stream_is_not_resumed_where_it_was_lost_nor_where_there_is_no_room() -> None:
    async def body() -> None:
        lost = Fault(lambda _: EngineFailed("dead", "a"), 3)
        full = Fault(lambda _: Refused(Overloaded("busy"), "b"), 0)
        async with serving(lost) as (backend, replica):
            replica.faults.append(full)
            full.times = 0

            def then_full(_: Replica) -> EngineFailed:
                full.times = 1
                return EngineFailed("dead", "a")

            lost.act = then_full
            texts, _ = await collect(backend, request())
            assert texts == {0: text_of(5)}
            hints = [r.routing for r in replica.requests]
            assert [hint.avoid for hint in hints if hint is not None] == [(), ("a",), ("a", "b")]

    run(body())
