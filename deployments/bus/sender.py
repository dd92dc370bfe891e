"""The replica's end of the token bus: one connection to each ingress, one frame a step.

Guards every write: uvloop raises on a closed transport, and one dead ingress must not cost the
others their step. Knows no Ray and no engine; see listener.py for the other end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, cast

from deployments.bus.frames import HEARTBEAT, FrameError, FrameReader, encode_delta, encode_frame
from deployments.bus.listener import HEARTBEAT_S
from deployments.calls import Alive
from torchweave_ray.errors import TorchWeaveError
from torchweave_ray.outputs import BusAddress, RequestOutput

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
RETRY_AFTER_S = 10.0
"""An ingress that could not be reached is not tried again for so long."""
INGRESS_SILENCE_S = 15.0
"""An ingress that sends nothing for so long is gone: its requests are aborted. More patient than
the other direction, since a wrong guess here costs work and a late one only blocks of KV cache."""


class BusError(TorchWeaveError):
    """This ingress cannot be reached: the caller falls back to the handle."""


class OutgoingStream:
    """One request's way to its ingress."""

    def __init__(self, stream_id: int, connection: SenderConnection) -> None:
        self.id = stream_id
        self.num_entries = 0
        self._connection = connection

    def send(self, output: RequestOutput) -> None:
        """Into the frame of this step; leaves with the next `BusSender.flush`."""
        if output.deltas:
            self.num_entries += 1
            self._connection.entries.append([self.id, *map(encode_delta, output.deltas)])

    def close(self) -> None:
        self._connection.on_lost.pop(self.id, None)


class BusSender:
    """All connections of one replica. Loop-affine."""

    def __init__(
        self,
        replica: str,
        alive: Alive | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        silence_s: float = INGRESS_SILENCE_S,
        retry_after_s: float = RETRY_AFTER_S,
    ) -> None:
        self.replica = replica
        self.alive = alive or Alive()
        self._heartbeat_s = heartbeat_s
        self._silence_s = silence_s
        self._retry_after_s = retry_after_s
        self._connections: dict[str, SenderConnection] = {}
        self._connecting: dict[str, asyncio.Task[SenderConnection]] = {}
        self._failed_at: dict[str, float] = {}
        self._ticker: asyncio.Task[None] | None = None

    async def open(
        self, address: BusAddress, stream_id: int, on_lost: Callable[[], None]
    ) -> OutgoingStream:
        """Announce a stream to its ingress. `on_lost` is called once if the connection goes.

        Raises BusError when the ingress cannot be reached or refuses us.
        """
        connection = await self._connection(address)
        connection.on_lost[stream_id] = on_lost
        connection.entries.append([stream_id])
        connection.flush()
        return OutgoingStream(stream_id, connection)

    def flush(self) -> None:
        """Send what this step gave: called once after all outputs of a step."""
        for connection in list(self._connections.values()):
            connection.flush()

    async def stop(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        for connection in list(self._connections.values()):
            connection.drop("the replica stops")

    async def _connection(self, address: BusAddress) -> SenderConnection:
        connection = self._connections.get(address.ingress_id)
        if connection is not None:
            return connection
        task = self._connecting.get(address.ingress_id)
        if task is None:
            loop = asyncio.get_running_loop()
            failed_at = self._failed_at.get(address.ingress_id)
            if failed_at is not None and loop.time() - failed_at < self._retry_after_s:
                raise BusError(f"bus at {address.host}:{address.port} failed a moment ago")
            task = loop.create_task(self._connect(address))
            self._connecting[address.ingress_id] = task
            task.add_done_callback(lambda _: self._connecting.pop(address.ingress_id, None))
        # Shielded: a caller that leaves must not cut off the others that wait for it.
        return await asyncio.shield(task)

    async def _connect(self, address: BusAddress) -> SenderConnection:
        loop = asyncio.get_running_loop()
        connection = SenderConnection(self, address)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await loop.create_connection(lambda: connection, address.host, address.port)
                await connection.accepted
        except (OSError, BusError) as error:  # a timeout is an OSError
            self._failed_at[address.ingress_id] = loop.time()
            connection.drop("not accepted")
            logger.warning("[Bus] no way to %s:%d: %r", address.host, address.port, error)
            raise BusError(f"bus at {address.host}:{address.port}: {error!r}") from error
        self._failed_at.pop(address.ingress_id, None)
        self._connections[address.ingress_id] = connection
        if self._ticker is None:
            self._ticker = loop.create_task(self._tick())
        return connection

    def forget(self, connection: SenderConnection) -> None:
        if self._connections.get(connection.address.ingress_id) is connection:
            del self._connections[connection.address.ingress_id]

    async def _tick(self) -> None:
        """Heartbeats out; requests of silent ingresses given up."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(self._heartbeat_s)
            now = loop.time()
            on_time = now - before < 2 * self._heartbeat_s
            before = now
            for connection in list(self._connections.values()):
                if on_time and now - connection.last_seen > self._silence_s:
                    connection.drop(f"silent for {self._silence_s:g} s")
                else:
                    connection.write(HEARTBEAT)


class SenderConnection(asyncio.Protocol):
    """One ingress's connection; the first frame back from it means that we are accepted."""

    def __init__(self, sender: BusSender, address: BusAddress) -> None:
        self.address = address
        self.entries: list[list[Any]] = []
        self.on_lost: dict[int, Callable[[], None]] = {}
        self.last_seen = 0.0
        self._sender = sender
        self._loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self._loop.create_future()
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.last_seen = self._loop.time()
        self.write(
            {
                "secret": self.address.secret,
                "ingress_id": self.address.ingress_id,
                "replica": self._sender.replica,
                "alive": astuple(self._sender.alive),
            }
        )

    def data_received(self, data: bytes) -> None:
        self.last_seen = self._loop.time()
        try:
            if self._reader.feed(data) and not self.accepted.done():
                self.accepted.set_result(None)
        except FrameError as error:
            self.drop(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop("connection closed" if exc is None else str(exc))

    def flush(self) -> None:
        if self.entries:
            entries, self.entries = self.entries, []
            self.write(entries)

    def write(self, value: Any) -> None:
        if self._closed or self._transport is None or self._transport.is_closing():
            return
        try:
            self._transport.write(encode_frame(value))
        except (RuntimeError, OSError) as error:
            self.drop(str(error))

    def drop(self, why: str) -> None:
        """Close, and give up every request of this ingress. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self.accepted.done():
            logger.info("[Bus] lost ingress %s: %s", self.address.ingress_id[:8], why)
        else:
            self.accepted.set_exception(BusError(why))
            self.accepted.exception()  # whoever waits gets it; nobody may be waiting
        self._sender.forget(self)
        if self._transport is not None:
            self._transport.abort()
        callbacks, self.on_lost = list(self.on_lost.values()), {}
        for on_lost in callbacks:
            on_lost()
