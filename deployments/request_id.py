"""One x-request-id an answer: Serve puts the header on every one, behind the application's own."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = "x-request-id"


class SaidByServe:
    """Middleware, outside of whatever answers. Serve has given the request its id, or kept the
    client's, and will repeat it; only an id that differs, in place of one we would not take over,
    is left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get(NAME)

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if said is not None and headers.get(NAME) == said:
                    del headers[NAME]
            await send(message)

        await self._app(scope, receive, send_without)
