"""The ingress's span of a call, and the trace context that its requests carry on."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchweave_ray.tracing import (
    TRACEPARENT,
    Tracing,
    traceparent_of,
    tracing_from_environment,
)


def traced(app: ASGIApp) -> ASGIApp:
    """`app` itself where tracing is off."""
    tracing = tracing_from_environment()
    return app if tracing is None else TracedApp(app, tracing)


class TracedApp:
    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path, given = scope["path"], Headers(scope=scope).get("traceparent", "")
        span = self._tracing.begin(f"POST {path}", given)
        token = TRACEPARENT.set(traceparent_of(span))

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            TRACEPARENT.reset(token)
            span.end()
