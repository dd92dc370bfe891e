"""The token bus over real sockets, without Ray: format, secret, heartbeat, lost connections."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from deployments.bus.frames import (
    FrameError,
    FrameReader,
    decode_delta,
    encode_delta,
    encode_frame,
)
from deployments.bus.listener import BusListener, IncomingStream
from deployments.bus.sender import BusError, BusSender
from deployments.calls import Alive
from torchweave_ray.outputs import ChoiceDelta, FinishReason, RequestOutput, TokenLogprobs


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(coroutine, 10)

    asyncio.run(limited())


@asynccontextmanager
async def bus(
    dead_after_s: float = 4.0, silence_s: float = 15.0, sender_heartbeat_s: float = 0.02
) -> AsyncIterator[tuple[BusListener, BusSender]]:
    listener = BusListener(heartbeat_s=0.02, dead_after_s=dead_after_s, hello_timeout_s=0.1)
    sender = BusSender("replica-1", heartbeat_s=sender_heartbeat_s, silence_s=silence_s)
    await listener.start("127.0.0.1")
    try:
        yield listener, sender
    finally:
        await sender.stop()
        await listener.stop()


async def until(stream: IncomingStream, num_entries: int) -> list[ChoiceDelta]:
    taken: list[ChoiceDelta] = []
    while True:
        taken += [delta for deltas in stream.take() for delta in deltas]
        if stream.num_entries >= num_entries:
            return taken
        await stream.wait(5)


def output(index: int, text: str = "x", **more: Any) -> RequestOutput:
    return RequestOutput("r", (ChoiceDelta(0, index, (index + 100,), text, **more),))


DELTAS = [
    ChoiceDelta(0, 0, (1, 2), "plain"),
    ChoiceDelta(
        3, 17, (), "naïve 🙂 \n\r \ud800", finish_reason=FinishReason.STOP, stop_reason="x"
    ),
    ChoiceDelta(1, 5, (9,), "", finish_reason=FinishReason.ERROR, error="why"),
    ChoiceDelta(0, 1, (7,), "a", (TokenLogprobs(7, -0.1, 1, ((7, -0.1), (8, -math.inf))),)),
]


@pytest.mark.parametrize("delta", DELTAS, ids=range(len(DELTAS)))
def test_delta_survives_the_wire(delta: ChoiceDelta) -> None:
    (frame,) = FrameReader().feed(encode_frame([encode_delta(delta)]))
    assert decode_delta(frame[0]) == delta


def test_frames_are_cut_wherever_the_bytes_are_split() -> None:
    frames: list[Any] = [[], [[1, [0, 0, [5], "é"]]], {"secret": "s"}]
    data = b"".join(map(encode_frame, frames))
    for step in range(1, len(data) + 1):
        reader, got = FrameReader(), []
        for start in range(0, len(data), step):
            got += reader.feed(data[start : start + step])
        assert got == frames


def test_bad_frames_are_refused() -> None:
    with pytest.raises(FrameError, match="at most"):
        FrameReader(max_bytes=10).feed(struct.pack("!I", 11))
    with pytest.raises(FrameError, match="JSON"):
        FrameReader().feed(struct.pack("!I", 2) + b"\x80\x04")


def test_one_frame_a_step_for_all_streams() -> None:
    async def body() -> None:
        async with bus(sender_heartbeat_s=60) as (listener, sender):
            streams = [listener.open() for _ in range(3)]
            outs = [await sender.open(listener.address, s.id, lambda: None) for s in streams]
            (connection,) = listener.connections
            frames: list[Any] = []
            deliver = connection._deliver
            connection._deliver = lambda frame: (frames.append(frame), deliver(frame))  # type: ignore
            for step in range(4):
                for out in outs:
                    out.send(output(step, f"{out.id}{step}"))
                out.send(RequestOutput("r"))  # without deltas: nothing to carry
                sender.flush()
            for stream, out in zip(streams, outs, strict=True):
                deltas = await until(stream, out.num_entries)
                assert [d.text for d in deltas] == [f"{stream.id}{step}" for step in range(4)]
                assert out.num_entries == 4
            assert len([frame for frame in frames if any(len(e) > 1 for e in frame)]) == 4

    run(body())


def test_heartbeats_keep_an_idle_connection() -> None:
    async def body() -> None:
        async with bus(dead_after_s=0.15, silence_s=0.15) as (listener, sender):
            stream = listener.open()
            lost: list[int] = []
            await sender.open(listener.address, stream.id, lambda: lost.append(1))
            await asyncio.sleep(0.5)
            assert not stream.lost
            assert not lost

    run(body())


def test_silent_replica_is_lost() -> None:
    async def body() -> None:
        async with bus(dead_after_s=0.1, sender_heartbeat_s=60) as (listener, sender):
            stream = listener.open()
            out = await sender.open(listener.address, stream.id, lambda: None)
            out.send(output(0))
            sender.flush()
            while not stream.lost:
                assert await stream.wait(5)
            assert [delta.token_ids for (delta,) in stream.take()] == [(100,)], "what came counts"
            assert not listener.connections

    run(body())


def test_a_replica_is_doubtful_before_it_is_lost_and_until_it_comes_back() -> None:
    async def body() -> None:
        async with bus(dead_after_s=0.3, sender_heartbeat_s=60) as (listener, sender):
            sender.alive = Alive("r1")
            await sender.open(listener.address, 1, lambda: None)
            assert listener.doubtful() == ()
            await asyncio.sleep(0.1)
            assert listener.connections
            assert listener.doubtful() == ("r1",), "silent"
            while listener.connections:
                await asyncio.sleep(0.01)
            assert listener.doubtful() == ("r1",), "lost"
            await sender.stop()
            again = BusSender("r1", heartbeat_s=0.02)
            again.alive = Alive("r1")
            await again.open(listener.address, 2, lambda: None)
            assert listener.doubtful() == ()
            await again.stop()

    run(body())


def test_silent_ingress_is_lost() -> None:
    async def body() -> None:
        async with bus(silence_s=0.1) as (listener, sender):
            lost = asyncio.Event()
            stream = listener.open()
            await sender.open(listener.address, stream.id, lost.set)
            assert listener._ticker is not None
            listener._ticker.cancel()
            await lost.wait()

    run(body())


def test_wrong_secret_is_refused_and_not_tried_again_at_once() -> None:
    async def body() -> None:
        async with bus() as (listener, sender):
            forged = replace(listener.address, secret="0" * 32)
            with pytest.raises(BusError):
                await sender.open(forged, 1, lambda: None)
            with pytest.raises(BusError, match="a moment ago"):
                await sender.open(forged, 2, lambda: None)
            assert not listener.connections

    run(body())


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        encode_frame([]),
        encode_frame({"secret": 1}),
        struct.pack("!I", 1 << 20),
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!I", 3) + json.dumps([1]).encode(),
    ],
    ids=["silent", "heartbeat", "no ingress", "too long", "http", "list"],
)
def test_a_stranger_is_dropped(hello: bytes) -> None:
    async def body() -> None:
        async with bus() as (listener, _):
            address = listener.address
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(hello)
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            assert not listener.connections

    run(body())


def test_lost_connection_reaches_both_ends_and_writes_do_not_raise() -> None:
    async def body() -> None:
        async with bus() as (listener, sender):
            lost = asyncio.Event()
            stream = listener.open()
            out = await sender.open(listener.address, stream.id, lost.set)
            out.send(output(0))
            sender.flush()
            await until(stream, 1)
            (connection,) = listener.connections
            connection.drop("test")
            assert stream.lost
            await lost.wait()
            out.send(output(0))
            sender.flush()
            # The next request gets a connection of its own.
            again = listener.open()
            out = await sender.open(listener.address, again.id, lambda: None)
            out.send(output(0))
            sender.flush()
            assert len(await until(again, 1)) == 1

    run(body())


def test_callers_share_one_connection_and_closed_streams_are_forgotten() -> None:
    async def body() -> None:
        async with bus() as (listener, sender):
            streams = [listener.open() for _ in range(5)]
            outs = await asyncio.gather(
                *(sender.open(listener.address, s.id, lambda: None) for s in streams)
            )
            (connection,) = listener.connections
            for out in outs:
                out.send(output(0))
            sender.flush()
            await until(streams[4], 1)
            for stream, out in zip(streams, outs, strict=True):
                listener.close(stream)
                out.send(output(1))  # late: dropped without a word
                out.close()
            sender.flush()
            assert not listener.streams
            assert not connection.streams

    run(body())
