"""`GET /metrics`, and what the HTTP side counts: answers by path and status, errors by kind.

Paths are those of the table, so that no client can make new series.
"""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchweave_ray.api.observe.traces import traced
from torchweave_ray.metrics import CONTENT_TYPE, SECONDS, MetricSet, exposition
from torchweave_ray.outputs import Backend
from torchweave_ray.reported import Reported

KINDS = {
    400: "invalid_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    408: "slow_body",
    413: "too_large",
    431: "headers_too_large",
    429: "overloaded",
    500: "internal",
    503: "unavailable",
    504: "deadline",
}
USUAL = ("200", "400", "429", "503")
UNCOUNTED = ("/metrics", "/health", "/readyz", "/livez")
"""Probes would hide what clients ask."""


class HttpMetrics(MetricSet):
    def __init__(self) -> None:
        super().__init__()
        self.answers = self.counter("http_requests", "HTTP answers", "path", "status")
        self.errors = self.counter("http_errors", "HTTP answers that are errors", "kind")
        self.histogram("http_first_byte_seconds", "Request to the answer's first byte", SECONDS)
        for kind in KINDS.values():
            self.errors.labels(kind)
        self._seen: set[str] = set()

    def note(self, path: str, status: int, seconds: float) -> None:
        if path not in self._seen:
            self._seen.add(path)
            for usual in USUAL:  # a rate needs the 0 that it grew from: a burst of 429 is seen
                self.answers.labels(path, usual)
        self.answers.labels(path, str(status)).inc()
        self.observe("http_first_byte_seconds", seconds)
        if status >= 400:
            self.errors.labels(KINDS.get(status, f"status_{status}")).inc()


class CountedApp:
    """Middleware: notes each answer when its first bytes of body are sent."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = traced(app)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].endswith(UNCOUNTED):
            await self._app(scope, receive, send)
            return
        started_at, status = time.monotonic(), 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status:
                path = getattr(scope.get("route"), "path", "other")  # set by the router
                self._metrics.note(path, status, time.monotonic() - started_at)
                status = 0
            await send(message)

        await self._app(scope, receive, send_counted)


class MetricsApi:
    def __init__(self, backend: Backend, metrics: HttpMetrics) -> None:
        self._backend = backend
        self._metrics = metrics

    async def text(self, request: Request) -> Response:
        """Of this process and of every replica that answers."""
        own: Reported = ({}, self._metrics.collect())
        reports = [own, *await self._backend.metrics()]
        return Response(exposition(reports), media_type=CONTENT_TYPE)
