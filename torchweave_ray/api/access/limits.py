"""How much one call may bring: headers, body, time to send and to read, prompts and parameters.

Each limit is a field of `ApiSettings`, and what is over it an error that names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchweave_ray.api.errors import answer_to
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.errors import HeadersTooLarge, InvalidRequest, RequestTimeout, RequestTooLarge
from torchweave_ray.sampling_params import SamplingParams


class BoundedApp:
    """Middleware: refuses large headers, and lets go of clients that do not read their answers."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._settings.max_header_bytes
        num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > most:
            error = HeadersTooLarge(
                f"path and headers have {num_bytes} bytes, at most {most}",
                None,
                "headers_too_large",
            )
            await answer_to(scope["path"], error)(scope, receive, send)
            return
        with _Watch(send, self._settings.write_timeout_s) as watch:
            await self._app(scope, receive, watch.send)


class _Watch:
    """Cancels the current task when the client takes nothing for too long. One timer serves the
    whole answer: a token costs two attributes."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._waits_since: float | None = None
        self._has_expired = False

    async def send(self, message: Message) -> None:
        self._waits_since = self._loop.time()
        await self._send(message)
        self._waits_since = None

    def __enter__(self) -> _Watch:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancels = task.cancelling()
        self._timer = self._loop.call_later(self._timeout_s, self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """An answer that ends in the middle has its connection closed by the server."""
        self._timer.cancel()
        if not self._has_expired:
            return False
        only_ours = self._task.uncancel() <= self._num_cancels
        return only_ours and kind is asyncio.CancelledError

    def _look(self) -> None:
        since = self._waits_since
        wait_s = self._timeout_s
        if since is not None:
            wait_s -= self._loop.time() - since
        if wait_s <= 0:
            self._has_expired = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(wait_s, self._look)


async def read_body(scope: Scope, receive: Receive, settings: ApiSettings) -> bytes:
    """Raises RequestTooLarge, before reading when the length is announced, and RequestTimeout."""
    limit = settings.max_body_bytes
    announced = Headers(scope=scope).get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    chunks, num_bytes = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return b""
                chunk: bytes = message.get("body", b"")
                num_bytes += len(chunk)
                if num_bytes > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise RequestTimeout(
            f"the body was not here within {settings.body_timeout_s:g} s", None, "body_timeout"
        ) from None


def check_depth(body: Any, raw: bytes, most: int) -> None:
    """Raises InvalidRequest for JSON that is nested too deep, such as a schema."""
    if raw.count(b"{") + raw.count(b"[") <= most:
        return
    depth, level = 0, [("", body)]
    while level:
        depth += 1
        if depth > most:
            field = level[0][0] or None
            where = "the body" if field is None else field
            raise InvalidRequest(
                f"{where} is nested too deep: at most {most} levels of the body",
                field,
                "invalid_json",
            )
        level = [
            (field or str(key), inner)
            for field, each in level
            for key, inner in (each.items() if isinstance(each, dict) else enumerate(each))
            if isinstance(inner, dict | list)
        ]


def check_call(
    settings: ApiSettings,
    prompts: Sequence[tuple[int, ...]],
    n: int,
    sampling: SamplingParams,
    prompt_param: str,
    max_choices: int | None = None,
) -> None:
    """Raises InvalidRequest naming the field that is over its limit."""
    most = settings.max_prompt_tokens
    longest = max(map(len, prompts), default=0)
    if most is not None and longest > most:
        raise InvalidRequest(
            f"{prompt_param} has {longest} tokens, at most {most}", prompt_param, "prompt_too_long"
        )
    most_choices = max_choices or settings.max_choices
    _check("n" if n > 1 else prompt_param, len(prompts) * n, most_choices, "choices")
    _check("stop", len(sampling.stop), settings.max_stop_strings, "stop strings")
    _check("stop_token_ids", len(sampling.stop_token_ids), settings.max_logit_bias, "token ids")
    _check("logit_bias", len(sampling.logit_bias), settings.max_logit_bias, "biases")


def check_grammar(settings: ApiSettings, text: str, param: str) -> None:
    _check(param, len(text), settings.max_grammar_chars, "characters of a schema or grammar")


def _check(param: str, number: int, most: int, what: str) -> None:
    if number > most:
        raise InvalidRequest(f"{param}: {number} {what}, at most {most}", param)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the request body is over {limit} bytes", None, "body_too_large")
