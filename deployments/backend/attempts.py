"""One attempt at a request: a call to one replica, its tokens by the bus or by the handle.

Always cancels the call when it is left: only then are the replica's blocks free at once. Knows
nothing of resuming; see ray_backend.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from deployments.backend.fleet import Fleet, placed_on, running_replicas
from deployments.bus.listener import DEAD_AFTER_S, BusListener, IncomingStream
from deployments.calls import Alive, BusFailed, EngineFailed, Finished, Refused
from torchweave_ray.api.streams.merging import merged
from torchweave_ray.errors import RequestError, TorchWeaveError, Unavailable
from torchweave_ray.outputs import GenerateRequest, RequestOutput, merge_outputs

BROADCAST_TIMEOUT_S = 5.0
START_S = 30.0
"""Longest wait of a request while no replica of its model runs."""
TakenBy = Callable[[Alive], None]
"""Hears which replica answers."""


class Lost(TorchWeaveError):
    """This attempt's replica or bus is gone; the request can go on elsewhere.

    `replica` is not to be tried again; "" when nothing is known against it.
    """

    def __init__(self, reason: str, replica: str = "") -> None:
        super().__init__(reason)
        self.replica = replica


class NoRoom(TorchWeaveError):
    """A replica refused, with `error`; another one may have room."""

    def __init__(self, error: RequestError, replica: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.replica = replica


class ModelClient:
    """The calls of one model's deployment, each a handle configured once, as every handle opens
    a router and a long poll. gRPC with plain pickle: one server stream a request."""

    def __init__(self, handle: Any, longest_stream_s: float, may_sleep: bool = False) -> None:
        """`may_sleep`: it may be scaled to no replica at all; a request wakes it."""
        self.may_sleep = may_sleep
        self.handle = handle.options(
            _by_reference=False, request_serialization="pickle", response_serialization="pickle"
        )
        self.generate = self.handle.options(method_name="generate")
        self.generate_stream = self.handle.options(method_name="generate_stream", stream=True)
        self.describe = self.handle.options(method_name="describe")
        self.adapter = self.handle.options(method_name="adapter")
        self.adapters = self.handle.options(method_name="adapters")
        self.ping = self.handle.options(method_name="ping")
        called = (self.generate, self.generate_stream, self.describe)
        self.fleet = Fleet(lambda: running_replicas(called), longest_stream_s)

    @property
    def names(self) -> tuple[str, str]:
        """Of the deployment, and of its application."""
        return self.handle.deployment_name, self.handle.app_name

    async def ask_all(self, method: str, *args: object) -> list[object]:
        """What the replicas say, or the exceptions of those that do not; []: none was there."""
        try:
            answers: list[object] = await self.handle.broadcast(method, *args).results_async(
                timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True
            )
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return answers


async def over_bus(
    client: ModelClient,
    bus: BusListener,
    request: GenerateRequest,
    pace: Callable[[], Awaitable[None]],
    taken_by: TakenBy,
    tail_timeout_s: float = DEAD_AFTER_S,
) -> AsyncGenerator[RequestOutput]:
    """Deltas from the bus, the end from the call. `pace` waits between two chunks."""
    stream = bus.open()
    response = client.generate.remote(replace(request, delivery=bus.address), stream.id)
    call = asyncio.ensure_future(_result(response))
    call.add_done_callback(stream.wake)
    call.add_done_callback(_look_at)
    sent_at = time.monotonic()
    try:
        while True:
            entries = stream.take()
            end = _finished(call, stream, bool(entries))
            if entries or end:
                output = merge_outputs(
                    [RequestOutput(request.request_id, deltas) for deltas in entries or [()]]
                )
                yield output if end is None else _ended(output, end)
                if end is not None:
                    return
                if not any(delta.finish_reason for delta in output.deltas):
                    await pace()
            elif stream.lost:
                raise Lost("the bus connection is gone", _replica(stream))
            elif not call.done():
                if stream.connection is not None:
                    await stream.wait()
                elif not await stream.wait(DEAD_AFTER_S) and stream.connection is None:
                    _not_taken(client, client.generate, request, sent_at)
            elif not await stream.wait(tail_timeout_s):
                # Frames may come after the call has returned, but on a live bus they come soon.
                raise Lost("the last frames never came", _replica(stream))
    finally:
        if stream.connection is not None:
            taken_by(stream.connection.alive)
        bus.close(stream)
        response.cancel()
        call.cancel()


async def over_handle(
    client: ModelClient, request: GenerateRequest, taken_by: TakenBy
) -> AsyncGenerator[RequestOutput]:
    """Everything as items of one streaming call."""
    response = client.generate_stream.remote(replace(request, delivery=None))
    replica = ""
    try:
        items = aiter(response)
        item = await _first(client, request, items)
        while item is not None:
            if isinstance(item, RequestError):
                raise item
            if isinstance(item, Refused):
                raise NoRoom(item.error, item.replica)
            if isinstance(item, EngineFailed):
                raise Lost(item.reason, item.replica)
            if not isinstance(item, Alive):
                yield item
            elif client.fleet.must_move(item):
                raise Lost("its replica is about to stop", item.replica)
            else:
                replica = item.replica
                taken_by(item)
            async with asyncio.timeout(DEAD_AFTER_S):
                item = await anext(items, None)
    except TimeoutError:
        raise Lost(f"no sign of life for {DEAD_AFTER_S:g} s", replica) from None
    except RequestCancelledError:
        raise asyncio.CancelledError from None
    except RayActorError as error:
        raise Lost(f"the replica is gone ({type(error).__name__})") from error
    except DeploymentUnavailableError as error:
        raise Unavailable(f"{request.model} is unavailable: {error}", None, None, 5.0) from None
    finally:
        response.cancel()


def choices_over_handle(
    client: ModelClient, requests: list[tuple[int | None, GenerateRequest]], taken_by: TakenBy
) -> AsyncGenerator[RequestOutput]:
    """Several requests at once, each shown under its choice's index (None: as it is)."""
    return merged(
        [_relabelled(over_handle(client, request, taken_by), index) for index, request in requests]
    )


async def _first(client: ModelClient, request: GenerateRequest, items: AsyncIterator[Any]) -> Any:
    """The first item, which comes at once from a replica that takes the request."""
    sent_at = time.monotonic()
    first = asyncio.ensure_future(anext(items, None))
    try:
        while not (await asyncio.wait([first], timeout=DEAD_AFTER_S))[0]:
            _not_taken(client, client.generate_stream, request, sent_at)
        return first.result()
    finally:
        first.cancel()


def _not_taken(client: ModelClient, handle: Any, request: GenerateRequest, sent_at: float) -> None:
    """Serve itself would wait for ever, also when the deployment is deleted meanwhile."""
    if client.fleet.running():
        silent = placed_on(handle, request.request_id)
        raise Lost(f"no replica has taken it within {DEAD_AFTER_S:g} s", silent)
    if time.monotonic() - sent_at > START_S:
        raise Unavailable(f"no replica of {request.model} runs", None, None, 5.0)


def _replica(stream: IncomingStream) -> str:
    return stream.connection.alive.replica if stream.connection is not None else ""


def _finished(
    call: asyncio.Future[Finished], stream: IncomingStream, has_news: bool
) -> Finished | None:
    """The call's result once all entries it promises are here. What ended it instead is raised,
    but only when there are no more news: the client gets all that has arrived."""
    if not call.done() or (has_news and call.exception() is not None):
        return None
    result = call.result()
    return result if stream.num_entries >= result.num_entries else None


def _ended(output: RequestOutput, end: Finished) -> RequestOutput:
    return replace(output, usage=end.usage, timings=end.timings)


def _look_at(call: asyncio.Future[Finished]) -> None:
    """Whoever waited for it may have left: its error is then nobody's."""
    if not call.cancelled():
        call.exception()


async def _result(response: Any) -> Finished:
    try:
        result = await response
    except RequestCancelledError:  # Serve cancels a call's own calls before the call itself
        raise asyncio.CancelledError from None
    except RayActorError as error:
        raise Lost(f"the replica is gone ({type(error).__name__})") from error
    except DeploymentUnavailableError as error:
        raise Unavailable(f"the deployment is unavailable: {error}", None, None, 5.0) from None
    if isinstance(result, BusFailed):
        raise Lost(result.reason)
    if isinstance(result, EngineFailed):
        raise Lost(result.reason, result.replica)
    if isinstance(result, Refused):
        raise NoRoom(result.error, result.replica)
    if isinstance(result, RequestError):
        raise result
    assert isinstance(result, Finished)
    return result


async def _relabelled(
    outputs: AsyncGenerator[RequestOutput], index: int | None
) -> AsyncGenerator[RequestOutput]:
    async with aclosing(outputs):
        async for output in outputs:
            if index is not None:
                deltas = tuple(replace(delta, index=index) for delta in output.deltas)
                output = replace(output, deltas=deltas)
            yield output
