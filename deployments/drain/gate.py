"""`Gate`: what an ingress has open, and the refusal of what comes once it is told to stop.

ASGI and plain calls alike. Knows neither Ray nor models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchweave_ray.api.errors import error_response
from torchweave_ray.errors import Unavailable

RETRY_AFTER_S = 5.0
ALWAYS_OPEN = ("/health", "/readyz", "/livez", "/metrics")
"""They tell of this process, also while it drains."""


class Gate:
    def __init__(self) -> None:
        self.num_open = 0
        self.is_closed = False

    def check(self) -> None:
        """Raises Unavailable once the gate is closed."""
        if self.is_closed:
            raise Unavailable("this server is shutting down", None, "draining", RETRY_AFTER_S)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around one request, its stream included; raises Unavailable once closed."""
        self.check()
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


class GatedApp:
    """Middleware: a request that comes too late gets a 503 and a closed connection."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            """A connection that is kept alive would bring more requests to a closed gate."""
            if message["type"] == "http.response.start" and self._gate.is_closed:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        # Whoever stops a request of his helps us to end.
        if scope["method"] == "DELETE" or scope["path"].endswith(ALWAYS_OPEN):
            await self._app(scope, receive, send_last)
            return
        try:
            self._gate.check()
        except Unavailable as error:
            await error_response(error)(scope, receive, send_last)
            return
        with self._gate.passing():
            await self._app(scope, receive, send_last)
