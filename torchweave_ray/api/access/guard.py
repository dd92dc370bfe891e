"""Middleware that lets in who has a key, and counts what each key's calls take.

Everything is guarded but the paths listed here, whether or not there is such a route.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from starlette._utils import get_route_path  # the one that the router goes by
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchweave_ray.api.access.access import Access
from torchweave_ray.api.access.caller import CALLER, Caller
from torchweave_ray.api.access.key_file import ApiKey
from torchweave_ray.api.access.keyring import Keyring
from torchweave_ray.api.access.quota import Accounts
from torchweave_ray.api.errors import answer_to
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.errors import Forbidden, RequestError, Unauthenticated

HEALTH = frozenset({"/health", "/readyz", "/livez"})
METRICS = "/metrics"
PAGES = frozenset({"/", "/docs", "/openapi.json"})
PAGE_FILES = "/playground/"
_STREAMS = "/v1/streams/"
_HOW = "send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"


class Guard:
    def __init__(
        self, app: ASGIApp, keyring: Keyring, accounts: Accounts, settings: ApiSettings
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._accounts = accounts
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope) if scope["type"] == "http" else ""
        if scope["type"] == "lifespan" or path in HEALTH:
            await self._app(scope, receive, send)
            return
        try:
            key = await self._key(scope, path)
        except RequestError as error:
            answer = answer_to(path, error)
            if isinstance(error, Unauthenticated):
                answer.headers["WWW-Authenticate"] = _challenge(path)
            await answer(scope, receive, send)
            return
        token = CALLER.set(Caller(key))
        try:
            if key is None or not _is_counted(scope, path):
                await self._app(scope, receive, send)
            else:
                await self._counted(key, path, scope, receive, send)
        finally:
            CALLER.reset(token)

    async def _counted(
        self, key: ApiKey, path: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._limits(key):
                    headers[name] = value
            await send(message)

        try:
            await self._accounts.enter(key, is_new=not path.startswith(_STREAMS))
        except RequestError as error:
            await answer_to(path, error)(scope, receive, send_with_limits)
            return
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            self._accounts.leave(key)

    async def _key(self, scope: Scope, path: str) -> ApiKey | None:
        """None: the path needs none. Raises Unauthenticated or Forbidden."""
        settings = self._settings
        if path == METRICS and not settings.metrics_need_key:
            return None
        if _is_page(path) and not settings.pages_need_key:
            return None
        presented = _presented(Headers(scope=scope), scope.get("method", "GET"))
        if presented is None:
            raise Unauthenticated(f"an API key is needed: {_HOW}", None, "invalid_api_key")
        key = await self._keyring.find(presented)
        if key is None:
            raise Unauthenticated(f"the API key is not valid; {_HOW}", None, "invalid_api_key")
        if key.is_expired():
            raise Unauthenticated("the API key has expired", None, "expired_api_key")
        if path == METRICS and not key.operator:
            raise Forbidden("metrics tell of all tenants: only an operator's key reads them")
        return key

    def _limits(self, key: ApiKey) -> Iterator[tuple[str, str]]:
        """As OpenAI's server names them."""
        for kind, left in self._accounts.left(key).items():
            yield f"x-ratelimit-limit-{kind}", str(left.limit)
            yield f"x-ratelimit-remaining-{kind}", str(left.remaining)
            yield f"x-ratelimit-reset-{kind}", f"{left.reset_s:.3f}s"


def guarding(access: Access, settings: ApiSettings) -> list[Middleware]:
    """Empty without a keys file."""
    if access.keyring is None:
        return []
    return [Middleware(Guard, keyring=access.keyring, accounts=access.accounts, settings=settings)]


def _is_page(path: str) -> bool:
    return path in PAGES or path.startswith(PAGE_FILES)


def _is_counted(scope: Scope, path: str) -> bool:
    """What makes work, and streams that are opened again."""
    return scope["method"] == "POST" or path.startswith(_STREAMS)


def _challenge(path: str) -> str:
    """A browser asks its user for a password, which is the key, when it opens a page."""
    return 'Basic realm="API key as password"' if _is_page(path) else "Bearer"


def _presented(headers: Headers, method: str) -> str | None:
    """The key that a request brings, as text."""
    own = headers.get("x-api-key")
    if own is not None:
        return own.strip()
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic" and (method in ("GET", "HEAD") or _is_same_origin(headers)):
        return _password(value)
    return None


def _password(value: str) -> str | None:
    try:
        user, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return password or user


def _is_same_origin(headers: Headers) -> bool:
    """A browser sends a password along by itself, also with what another site's page asks it to."""
    return headers.get("origin", "").partition("://")[2] == headers.get("host")
