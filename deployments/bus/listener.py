"""The ingress's end of the token bus: it listens, one connection comes from each replica.

Frames only carry deltas. Admission, cancellation, death and the final usage travel on the handle
call that stays open beside; see sender.py for the replica's end. Knows no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import uuid
from collections.abc import Callable
from hmac import compare_digest
from typing import Any, cast

from deployments.bus.frames import HEARTBEAT, FrameError, FrameReader, decode_delta, encode_frame
from deployments.calls import Alive
from torchweave_ray.outputs import BusAddress, ChoiceDelta

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
DEAD_AFTER_S = 4.0
"""A replica that sends nothing for so long is taken for lost, and not later."""
CHECKS = 4
"""Looks for silent replicas between two heartbeats."""
DOUBT_AFTER_BEATS = 2
"""Not lost yet, but nothing new goes, if it can be helped, to one that has been silent so long."""
DOUBT_S = 10.0
"""How long one whose connection was lost counts as doubtful: Serve finds out meanwhile."""
HELLO_TIMEOUT_S = 2.0
MAX_HELLO_BYTES = 4096


class IncomingStream:
    """What has arrived for one attempt of one request. One consumer; loop-affine, no locks."""

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.num_entries = 0
        """Entries received: the call's return value says how many there are in all."""
        self.lost = False
        """Its connection is gone; what is pending still counts."""
        self.connection: IngressConnection | None = None
        self._pending: list[tuple[ChoiceDelta, ...]] = []
        self._wake: asyncio.Future[None] | None = None

    def push(self, rows: list[list[Any]]) -> None:
        self._pending.append(tuple(map(decode_delta, rows)))
        self.num_entries += 1
        self.wake()

    def take(self) -> list[tuple[ChoiceDelta, ...]]:
        """The deltas of every entry that has arrived since the last time."""
        taken, self._pending = self._pending, []
        return taken

    def wake(self, *_: object) -> None:
        """Have `wait` return: something about this stream has changed."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def mark_lost(self) -> None:
        self.lost = True
        self.wake()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Until the next `wake`; False when there is none within `timeout_s`. Check for news
        before waiting."""
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(self._wake, timeout_s)
        except TimeoutError:
            return False
        finally:
            self._wake = None
        return True


class BusListener:
    """Accepts replicas that know the secret and hands their frames to the open streams."""

    def __init__(
        self,
        heartbeat_s: float = HEARTBEAT_S,
        dead_after_s: float = DEAD_AFTER_S,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
    ) -> None:
        self.hello_timeout_s = hello_timeout_s
        self.streams: dict[int, IncomingStream] = {}
        self.connections: set[IngressConnection] = set()
        self._heartbeat_s = heartbeat_s
        self._dead_after_s = dead_after_s
        self._lost_at: dict[str, float] = {}
        """Replicas whose last connection is gone, by their ids."""
        self._ids = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._address: BusAddress | None = None

    @property
    def address(self) -> BusAddress:
        assert self._address is not None, "started before it is used"
        return self._address

    async def start(self, host: str) -> BusAddress:
        """Listen on a free port of `host`; the address travels in every request."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: IngressConnection(self), host, 0)
        port = self._server.sockets[0].getsockname()[1]
        self._address = BusAddress(host, port, secrets.token_hex(16), uuid.uuid4().hex)
        self._ticker = loop.create_task(self._tick())
        return self._address

    def open(self) -> IncomingStream:
        stream = IncomingStream(next(self._ids))
        self.streams[stream.id] = stream
        return stream

    def close(self, stream: IncomingStream) -> None:
        """Frames that still come for it are dropped."""
        self.streams.pop(stream.id, None)
        if stream.connection is not None:
            stream.connection.streams.discard(stream)

    def move(self, must_move: Callable[[Alive], bool]) -> None:
        """Tell the streams of replicas that are about to stop that these are lost."""
        for connection in list(self.connections):
            if connection.streams and must_move(connection.alive):
                logger.info("[Bus] %d streams leave %s", len(connection.streams), connection.alive)
                connection.lose_streams()

    def note_lost(self, replica: str) -> None:
        self._lost_at[replica] = asyncio.get_running_loop().time()

    def note_found(self, replica: str) -> None:
        self._lost_at.pop(replica, None)

    def doubtful(self) -> tuple[str, ...]:
        """Ids of the replicas that may not answer: silent, or their connection was lost."""
        now = asyncio.get_running_loop().time()
        self._lost_at = {r: at for r, at in self._lost_at.items() if now - at < DOUBT_S}
        heard_after = now - DOUBT_AFTER_BEATS * self._heartbeat_s
        silent = [c.alive.replica for c in self.connections if c.last_seen < heard_after]
        return (*self._lost_at, *silent)

    async def stop(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.drop("the ingress stops")

    async def _tick(self) -> None:
        """Heartbeats out; silent replicas dropped."""
        loop = asyncio.get_running_loop()
        before, every_s = loop.time(), self._heartbeat_s / CHECKS
        for number in itertools.count(1):
            await asyncio.sleep(every_s)
            now = loop.time()
            # When this loop itself stood still, what came meanwhile has not been read yet.
            on_time = now - before < self._heartbeat_s
            before = now
            for connection in list(self.connections):
                # The next look would be too late.
                if on_time and now - connection.last_seen > self._dead_after_s - every_s:
                    connection.drop(f"silent for {self._dead_after_s:g} s")
                elif number % CHECKS == 0:
                    connection.send_heartbeat()


class IngressConnection(asyncio.Protocol):
    """One replica's connection. Nothing counts before a hello with the right secret."""

    def __init__(self, listener: BusListener) -> None:
        self.last_seen = 0.0
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(MAX_HELLO_BYTES)
        self._transport: asyncio.Transport | None = None
        self._hello_timer: asyncio.TimerHandle | None = None
        self._replica = ""
        """Its name, once it is accepted."""
        self.alive = Alive()
        self._closed = False
        self.streams: set[IncomingStream] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        timeout = self._listener.hello_timeout_s
        self._hello_timer = self._loop.call_later(timeout, self.drop, "no hello")

    def data_received(self, data: bytes) -> None:
        self.last_seen = self._loop.time()
        try:
            for frame in self._reader.feed(data):
                if self._replica:
                    self._deliver(frame)
                else:
                    self._accept(frame)
        except (FrameError, ValueError, TypeError, KeyError) as error:
            self.drop(f"bad frame: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop("connection closed" if exc is None else str(exc))

    def send_heartbeat(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(HEARTBEAT))

    def drop(self, why: str) -> None:
        """Close, and tell every stream that came over it. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        if self._replica:
            self._listener.connections.discard(self)
            self._listener.note_lost(self.alive.replica)
            logger.info("[Bus] lost replica %s: %s", self._replica, why)
        else:
            logger.warning("[Bus] refused a connection: %s", why)
        self.lose_streams()
        if self._transport is not None:
            self._transport.abort()

    def lose_streams(self) -> None:
        for stream in self.streams:
            stream.mark_lost()
        self.streams.clear()

    def _accept(self, hello: Any) -> None:
        address = self._listener.address
        secret = str(hello["secret"])
        if not compare_digest(secret.encode(), address.secret.encode()):
            raise FrameError("wrong secret")
        if hello["ingress_id"] != address.ingress_id:
            raise FrameError("meant for another ingress")
        self._replica = str(hello["replica"]) or "?"
        self.alive = Alive(*map(str, hello["alive"]))
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self._reader.max_bytes = FrameReader().max_bytes
        self._listener.connections.add(self)
        self._listener.note_found(self.alive.replica)
        self.send_heartbeat()  # tells the replica that it is accepted
        logger.info("[Bus] replica %s connected", self._replica)

    def _deliver(self, frame: Any) -> None:
        for entry in frame:
            stream = self._listener.streams.get(entry[0])
            if stream is None:
                continue  # closed meanwhile
            if stream.connection is None:
                stream.connection = self
                self.streams.add(stream)
            if len(entry) > 1:
                stream.push(entry[1:])
