"""A stream goes on from the event that its client had last, at any ingress.

GET /v1/streams/{id} makes the call again as it was recorded, a POST with Last-Event-ID as its body
says, which needs no record. The seeds are those it had; what its client has is left out.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from torchweave_ray.api.access.caller import CALLER
from torchweave_ray.api.streams.event_ids import (
    PARAM,
    EventId,
    EventIds,
    Place,
    does_not_fit,
    parse_event_id,
)
from torchweave_ray.api.streams.records import whole
from torchweave_ray.api.streams.writers import CatchingUp, NumberedWriter
from torchweave_ray.errors import InvalidRequest, RequestNotFound
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.stream_origin import StreamOrigin

if TYPE_CHECKING:
    from torchweave_ray.api.endpoint import Call, Endpoint, Handler
    from torchweave_ray.api.service import Service
    from torchweave_ray.api.sse import Writer

_STREAM_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Resumed:
    """A call that is made again."""

    requests: tuple[GenerateRequest, ...]
    """(): its body says them."""
    last: EventId | None
    """None: the client has nothing."""


@dataclass(frozen=True, slots=True)
class OpenStream:
    """How the events of a call are numbered."""

    num_choices: int
    n: int
    last: EventId | None = None


def open_stream(
    call: Call, service: Service, requests: list[GenerateRequest]
) -> list[GenerateRequest]:
    """What is to be run: recorded, so that its stream can be opened again."""
    keep_s, resumed = service.settings.stream_keep_s, call.resumed
    if resumed is not None and resumed.requests:
        requests = list(resumed.requests)
    elif keep_s > 0:
        requests = _with_origins(call, requests, keep_s)
    else:
        return requests
    if resumed is not None:
        requests = list(map(_anew, requests))
    num_choices = sum(request.n for request in requests)
    last = resumed.last if resumed is not None else None
    if last is not None and len(last.places) != num_choices:
        raise does_not_fit()
    call.stream = OpenStream(num_choices, requests[0].n, last)
    for request in requests:
        call.stack.enter_context(service.streams.keep(request))
    return requests


def numbered(call: Call, writer: Writer) -> Writer:
    """The writer whose events have ids, if the call's stream can be opened again."""
    stream = call.stream
    if stream is None:
        return writer
    if stream.last is not None:
        return CatchingUp(writer, stream.last, stream.n)
    places = [Place() for _ in range(stream.num_choices)]
    return NumberedWriter(writer, EventIds(call.id, places), stream.n)


def _with_origins(
    call: Call, requests: Sequence[GenerateRequest], keep_s: float
) -> list[GenerateRequest]:
    return [
        replace(
            request,
            origin=StreamOrigin(
                call_id=call.id,
                path=call.path,
                body=call.raw if index == 0 else b"",  # one of them is enough
                created=call.created,
                keep_s=keep_s,
                index=index,
                num_requests=len(requests),
                request_id=request.request_id,
                n=request.n,
                seed=request.sampling.seed,
            ),
        )
        for index, request in enumerate(requests)
    ]


class StreamsApi:
    """An ASGI endpoint."""

    def __init__(self, service: Service, endpoints: Mapping[str, Endpoint]) -> None:
        """`endpoints`: those whose answers are streams, by path."""
        self._service = service
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        stream_id: str = request.path_params["stream_id"]
        last = _last_event_of(request, stream_id)
        requests = await self._requests(stream_id)
        origin = requests[0].origin
        assert origin is not None, "only requests with one are recorded"
        endpoint = self._endpoints[origin.path]
        await _end_the_old_run(self._service, stream_id)
        async with AsyncExitStack() as stack:
            call = endpoint.call(origin.body, stack, time.monotonic(), scope)
            call.id = stream_id
            call.created = origin.created
            call.resumed = Resumed(tuple(requests), last)
            await endpoint.run(call, scope, receive, send)

    async def _requests(self, stream_id: str) -> list[GenerateRequest]:
        """From here or from whoever keeps them; raises RequestNotFound."""
        if _STREAM_ID.fullmatch(stream_id):
            found = whole(self._service.streams.recall(stream_id))
            found = found or whole(await self._service.recall(stream_id))
            if found and found[0].tenant == CALLER.get().tenant:
                return found
        raise RequestNotFound(
            f"no stream {stream_id!r} is known: it never was, has been over for more than "
            f"{self._service.settings.stream_keep_s:g} s, or its record was lost",
            "stream_id",
            "stream_not_found",
        )


class ByBody:
    """Before the handler of a POST whose answer may be a stream: with a Last-Event-ID it is the
    one that the client has lost. The seeds that it had are in its body or come from its id."""

    def __init__(self, service: Service, handler: Handler) -> None:
        self._service = service
        self._handler = handler

    async def __call__(self, call: Call) -> ASGIApp:
        if call.resumed is None and call.last_event_id:
            if not self._service.settings.stream_keep_s:
                raise InvalidRequest("streams are not opened again: stream_keep_s is 0", PARAM)
            last = parse_event_id(call.last_event_id)
            await _end_the_old_run(self._service, last.stream_id)
            call.id = last.stream_id
            call.resumed = Resumed((), last if last.num_events else None)
        return await self._handler(call)


async def _end_the_old_run(service: Service, stream_id: str) -> None:
    """Nobody reads it any more, though it may not have been noticed."""
    if not service.running.stop(stream_id):
        await service.backend.stop(stream_id)


def _last_event_of(request: Request, stream_id: str) -> EventId | None:
    """Raises InvalidRequest for what is no id, or another stream's."""
    in_header, in_query = request.headers.get(PARAM), request.query_params.get("last_event_id")
    if in_header is not None and in_query is not None and in_header != in_query:
        raise InvalidRequest(f"{PARAM} and last_event_id contradict each other", PARAM)
    text = in_header if in_header is not None else in_query
    if not text:
        return None
    last = parse_event_id(text)
    if last.stream_id != stream_id:
        raise InvalidRequest(f"{PARAM} is of another stream", PARAM)
    return last if last.num_events else None


def _anew(request: GenerateRequest) -> GenerateRequest:
    """Under an id that the old run, which may still be ending, does not have."""
    return replace(request, request_id=f"{request.request_id}.again-{secrets.token_hex(4)}")
