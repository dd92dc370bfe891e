"""Silence, moves and updates over fake handles: streams leave replicas that cannot finish them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from deployments.backend import attempts
from deployments.backend.fleet import SUSPECT_S, Fleet
from deployments.beats import with_beats
from deployments.calls import Alive, Description
from tests.serve.test_resume import (
    LENGTH,
    Fault,
    Replica,
    collect,
    cut,
    die,
    request,
    run,
    serving,
    text_of,
)
from torchweave_ray.errors import InvalidRequest, Unavailable

A, B = Alive("a", "artifact", "numerics"), Alive("b", "artifact", "numerics")


async def _slow(*items: str) -> AsyncGenerator[str]:
    for item in items:
        await asyncio.sleep(0.05)
        yield item


def test_beats_fill_the_silence_only() -> None:
    async def body() -> None:
        got = [item async for item in with_beats(_slow("x", "y"), A, every_s=0.02)]
        assert [item for item in got if item is not A] == ["x", "y"]
        assert got[0] is A
        assert got[1] is A
        assert len(got) > 4
        got = [item async for item in with_beats(_slow("x", "y"), A, every_s=5)]
        assert got == [A, "x", "y"]

    run(body())


def test_who_makes_the_items_hears_that_nobody_listens() -> None:
    async def body() -> None:
        heard = []

        async def items() -> AsyncGenerator[str]:
            try:
                await asyncio.sleep(60)
                yield "never"
            finally:
                heard.append("closed")

        beats = with_beats(items(), A, every_s=0.01)
        assert [await anext(beats), await anext(beats)] == [A, A]
        await beats.aclose()
        assert heard == ["closed"]

    run(body())


@pytest.mark.parametrize("at", [0, 1, LENGTH])
def test_a_silent_replica_is_left(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(attempts, "DEAD_AFTER_S", 0.05)

    async def body() -> None:
        async with serving(use_bus=False) as (backend, replica):
            whole = replica.stream

            async def once_frozen(wanted: Any) -> AsyncGenerator[Any]:
                position = 0
                async for item in whole(wanted):
                    if len(replica.requests) == 1 and position == at:
                        await asyncio.sleep(60)
                    position += 1
                    yield item

            replica.stream = once_frozen  # type: ignore[method-assign]
            texts, _ = await collect(backend, request())
            assert texts == {0: text_of(5)}
            assert len(replica.requests) == 2

    run(body())


@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_nothing_more_goes_to_a_replica_that_was_lost(
    monkeypatch: pytest.MonkeyPatch, use_bus: bool
) -> None:
    """On the bus its stream ends, on the handle it never takes the request."""
    monkeypatch.setattr(attempts, "DEAD_AFTER_S", 0.05)
    monkeypatch.setattr(attempts, "placed_on", lambda *_: A.replica)

    async def body() -> None:
        async with serving(Fault(cut, 3), use_bus=use_bus) as (backend, replica):
            replica.sender.alive = A
            replica.step_s = 0.005
            whole = replica.stream

            async def not_taken_at_first(wanted: Any) -> AsyncGenerator[Any]:
                if len(replica.requests) == 1 and not use_bus:
                    await asyncio.sleep(60)
                async for item in whole(wanted):
                    yield item

            replica.stream = not_taken_at_first  # type: ignore[method-assign]
            for _ in range(2):
                texts, _ = await collect(backend, request())
                assert texts == {0: text_of(5)}
            avoided = [set(r.routing.avoid) for r in replica.requests if r.routing is not None]
            assert avoided == [set(), {A.replica}, {A.replica}]

    run(body())


def test_suspicion_ends() -> None:
    now = [0.0]
    fleet = Fleet(frozenset, 1.0, lambda: now[0])
    fleet.suspect("")
    assert fleet.suspects() == ()
    fleet.suspect("a")
    assert fleet.suspects() == ("a",)
    now[0] = SUSPECT_S
    assert fleet.suspects() == ()


@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_a_request_that_no_replica_can_take_is_told_so(
    monkeypatch: pytest.MonkeyPatch, use_bus: bool
) -> None:
    """As Serve does when the deployment is deleted while the call waits for its replica."""
    monkeypatch.setattr(attempts, "DEAD_AFTER_S", 0.02)
    monkeypatch.setattr(attempts, "START_S", 0.1)

    async def body() -> None:
        async with serving(use_bus=use_bus) as (backend, replica):

            async def waits(*_: Any) -> AsyncGenerator[Any]:
                await asyncio.sleep(60)
                yield None

            replica.call = replica.stream = waits  # type: ignore[method-assign,assignment]
            replica.fleet = Fleet(frozenset, 1.0)
            with pytest.raises(Unavailable, match="no replica of m runs") as caught:
                await collect(backend, request())
            assert caught.value.retry_after

    run(body())


def test_the_fleet_knows_who_leaves_and_who_could_take_over() -> None:
    now, running = [0.0], {"a", "b"}
    fleet = Fleet(lambda: frozenset(running), 100.0, lambda: now[0])
    assert not fleet.look()
    running.discard("a")
    assert not fleet.look()
    now[0] = 50.0
    assert not fleet.look(), "its streams may still end by themselves"
    now[0] = 95.0
    assert fleet.look()
    assert not fleet.must_move(A), "nobody is known to take over"
    fleet.note([replace(B, numerics_id="others")])
    assert not fleet.must_move(A), "it would be another text"
    fleet.note([B])
    assert fleet.must_move(A)
    assert not fleet.must_move(B)
    now[0] = 101.0
    assert not fleet.look(), "Serve has ended it"


@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_streams_of_a_leaving_replica_move(use_bus: bool) -> None:
    async def body() -> None:
        async with serving(use_bus=use_bus) as (backend, replica):
            running, now = {"a", "b"}, [0.0]
            fleet = replica.fleet = Fleet(lambda: frozenset(running), 10.0, lambda: now[0])
            replica.sender.alive = A
            replica.step_s = 0.005
            fleet.look()

            def leave(_: Replica) -> None:
                running.discard("a")
                fleet.look()
                now[0] = 9.5
                assert fleet.look()
                fleet.note([B])
                if backend._bus is not None:
                    asyncio.get_running_loop().call_soon(backend._bus.move, fleet.must_move)

            replica.faults = [Fault(leave, 3)]
            whole = replica.stream

            async def with_signs(wanted: Any) -> AsyncGenerator[Any]:
                alive = A if len(replica.requests) == 1 and not use_bus else B
                async for item in whole(wanted):
                    yield alive
                    if not isinstance(item, Alive):
                        yield item

            replica.stream = with_signs  # type: ignore[method-assign]
            texts, outputs = await collect(backend, request())
            assert texts == {0: text_of(5)}
            assert len(replica.requests) == 2
            assert 0 < len(replica.requests[1].output_token_ids) < LENGTH
            assert not any(output.numerics_id for output in outputs)

    run(body())


@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_other_numerics_are_told(use_bus: bool) -> None:
    async def body() -> None:
        async with serving(use_bus=use_bus) as (backend, replica):
            replica.sender.alive = A

            def moved(replica: Replica) -> None:
                replica.sender.alive = replace(B, numerics_id="others")
                die(replica)

            replica.faults = [Fault(moved, 3)]
            texts, outputs = await collect(backend, request())
            assert texts == {0: text_of(5)}
            assert [output.numerics_id for output in outputs if output.numerics_id] == ["others"]
            assert replica.requests[1].artifact_id == "artifact", "no other model may go on"

    run(body())


def other_artifact(_: Replica) -> InvalidRequest:
    return InvalidRequest("this replica serves artifact-2, not artifact-1", "artifact_id")


@pytest.mark.parametrize("same", [True, False], ids=["same tokenizer", "another tokenizer"])
def test_an_update_rolls_between_two_requests(same: bool) -> None:
    info: Any = None
    files = [{"tokenizer.json": b"1"}, {"tokenizer.json": b"1" if same else b"2"}]

    async def body() -> None:
        async with serving(Fault(other_artifact, 0)) as (backend, replica):
            replica.descriptions = [Description(info, each, {}) for each in files]
            wanted = request(artifact_id="artifact-1")
            if not same:
                with pytest.raises(Unavailable, match="another tokenizer"):
                    await collect(backend, wanted)
                return
            texts, _ = await collect(backend, wanted)
            assert texts == {0: text_of(5)}
            assert [each.artifact_id for each in replica.requests] == ["artifact-1", ""]

    run(body())


def test_a_stream_does_not_go_on_with_another_artifact() -> None:
    async def body() -> None:
        async with serving(use_bus=False) as (backend, replica):
            replica.sender.alive = A

            def lost(replica: Replica) -> None:
                replica.faults.append(Fault(other_artifact, 0, times=100))
                die(replica)

            replica.faults = [Fault(lost, 3)]
            with pytest.raises(Unavailable, match="serves artifact-2"):
                await collect(backend, request())

    run(body())
