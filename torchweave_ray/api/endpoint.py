"""The ASGI frame of every call: request ids, JSON bodies, and the client that leaves.

Knows nothing of models: an `Endpoint` hands a `Call` to its handler and sends the answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchweave_ray.api.access.limits import check_depth, read_body
from torchweave_ray.api.errors import INTERNAL_ERROR, error_response
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.deadline import Deadline, Late
from torchweave_ray.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RequestError,
)

if TYPE_CHECKING:
    from torchweave_ray.api.streams.resume import OpenStream, Resumed

logger = logging.getLogger(__name__)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_IDS = "torchweave.ids"
_MAY_BE_UNSAYABLE = re.compile(rb"\\u|NaN|Infinity|[eE]\+?\d{3}|\d{309}")
MAX_SESSION_ID = 256
_DEADLINE_HEADER = "x-deadline-ms"
MAX_DEADLINE_MS = 2**31 - 1


class _Ids(NamedTuple):
    own: str
    shown: str
    """The client's own id when it gave a harmless one; else equal to `own`."""


class Call:
    """One POST: its JSON object, and the stack that closes whatever it opened."""

    def __init__(
        self, path: str, raw: bytes, stack: AsyncExitStack, started_at: float, scope: Scope
    ) -> None:
        """Raises InvalidRequest for a body that is no JSON object."""
        ids: _Ids = scope[_IDS]
        self.path = path
        self.raw = raw
        self.body = _parse_object(raw)
        self.stack = stack
        self.request_id = ids.shown
        """The x-request-id of the answer, for the log."""
        self.id = ids.own
        """Unguessable: whoever knows it may stop the request."""
        self.started_at = started_at
        """On the monotonic clock, before the body was read."""
        self.session_id = _session_id(scope)
        """From x-session-id: calls of one session go to one replica."""
        self.last_event_id = Headers(scope=scope).get("last-event-id", "")
        self.created = int(time.time())
        """What the answer says of it."""
        self.resumed: Resumed | None = None
        """When it is made again for a client that has lost its stream."""
        self.stream: OpenStream | None = None
        """When its answer is a stream that can be opened again."""
        self.ignored: list[str] = []
        """Fields that were accepted without effect; the answer lists them."""
        self.deadline: Deadline | None = None
        self._timeout: asyncio.Timeout | None = None

    @property
    def headers(self) -> dict[str, str]:
        headers = {"X-Ignored-Params": ", ".join(self.ignored)} if self.ignored else {}
        return headers if self.stream is None else headers | {"X-Stream-Id": self.id}

    def limit(self, milliseconds: int) -> None:
        """It must end so long after it came; the sooner of two limits holds."""
        deadline = Deadline(self.started_at + milliseconds / 1e3)
        if self.deadline is None or deadline < self.deadline:
            self.deadline = deadline
            if self._timeout is not None:
                self._timeout.reschedule(self._ends_at())

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raises DeadlineExceeded inside when the deadline passes, also one set meanwhile."""
        timeout = asyncio.timeout_at(self._ends_at())
        self._timeout = timeout
        try:
            async with timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            raise DeadlineExceeded(Late.PASSED, None, "deadline_exceeded") from None
        finally:
            self._timeout = None

    def _ends_at(self) -> float | None:
        """On the loop's clock."""
        if self.deadline is None:
            return None
        return asyncio.get_running_loop().time() + self.deadline.seconds_left


Handler = Callable[[Call], Awaitable[ASGIApp]]


class Endpoint:
    """Runs a handler, then the answer that it gives, for as long as the client stays."""

    def __init__(self, path: str, handler: Handler, settings: ApiSettings) -> None:
        self._path = path
        self._handler = handler
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.monotonic()
        deadline_ms = _announced_deadline_ms(scope)
        raw = await read_body(scope, receive, self._settings)
        # The stack unwinds last: a client that leaves must not disturb the closing.
        async with AsyncExitStack() as stack:
            call = self.call(raw, stack, started_at, scope)
            if deadline_ms is not None:
                call.limit(deadline_ms)
            await self.run(call, scope, receive, send)

    def call(self, raw: bytes, stack: AsyncExitStack, started_at: float, scope: Scope) -> Call:
        call = Call(self._path, raw, stack, started_at, scope)
        check_depth(call.body, raw, self._settings.max_json_depth)
        return call

    async def run(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        async with _WhileConnected(receive):
            async with call.in_time():
                answer = await self._answer(call)
            await answer(scope, receive, send)

    async def _answer(self, call: Call) -> ASGIApp:
        try:
            return await self._handler(call)
        except RecursionError:
            # Nothing but the body has a depth that somebody else chose.
            raise _too_deep() from None


class RequestIds:
    """Puts x-request-id on every answer; what nobody else caught becomes a plain 500.

    A client's own id is echoed when it is harmless, and is never used for anything else.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        own = uuid.uuid4().hex
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else own
        scope[_IDS] = _Ids(own, request_id)
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("x-request-id %s failed", request_id)
            if has_begun:
                raise
            await error_response(RequestError(INTERNAL_ERROR))(scope, receive, send_with_id)


class _WhileConnected:
    """Cancels the current task when the client leaves, the way asyncio.timeout does in time."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancels = task.cancelling()
        self._watch = asyncio.create_task(self._wait())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._watch.cancel()
        if not self._has_left:
            return False
        only_ours = self._task.uncancel() <= self._num_cancels
        return only_ours and kind is asyncio.CancelledError

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()


def _session_id(scope: Scope) -> str:
    session_id = Headers(scope=scope).get("x-session-id", "")
    check_session_id(session_id, "x-session-id")
    return session_id


def check_session_id(session_id: str, param: str) -> None:
    if len(session_id) > MAX_SESSION_ID:
        raise InvalidRequest(f"{param} has more than {MAX_SESSION_ID} characters", param)


def _announced_deadline_ms(scope: Scope) -> int | None:
    text = Headers(scope=scope).get(_DEADLINE_HEADER)
    if text is None:
        return None
    value = int(text) if re.fullmatch("[0-9]{1,10}", text) else 0
    if not 1 <= value <= MAX_DEADLINE_MS:
        raise InvalidRequest(
            f"{_DEADLINE_HEADER} must be milliseconds, a whole number from 1 to {MAX_DEADLINE_MS}",
            _DEADLINE_HEADER,
        )
    return value


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object", None, "invalid_json")
        if _MAY_BE_UNSAYABLE.search(raw):
            _refuse_unsayable(body)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", None, "invalid_json") from None
    return body


def _too_deep() -> InvalidRequest:
    return InvalidRequest("the body is nested too deep", None, "invalid_json")


def _refuse_unsayable(body: dict[str, Any]) -> None:
    """What Python reads as JSON and no answer could repeat: half a character, which no text holds,
    and numbers that are none."""
    for key, value in body.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            name = key.encode("utf-8", "replace").decode()
            raise InvalidRequest(f"{name} holds half a surrogate pair", name) from None
        except ValueError:
            raise InvalidRequest(f"{key} must hold finite numbers only", key) from None
