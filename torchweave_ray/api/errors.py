"""Errors as HTTP answers: one JSON shape, never a stack trace. Knows nothing of endpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchweave_ray.deadline import Late
from torchweave_ray.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestError,
    Unavailable,
)

_ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
"""Whose clients know errors in another shape."""
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
INTERNAL_ERROR = "internal server error; the server's log has it under this x-request-id"


def error_response(error: RequestError) -> JSONResponse:
    """Status, body and, when trying again makes sense, Retry-After: whole seconds, as HTTP has it,
    and the milliseconds that OpenAI's clients read first."""
    headers = {}
    if isinstance(error, Overloaded | Unavailable) or error.retry_after is not None:
        seconds = error.retry_after or 1.0
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
        headers["Retry-After-Ms"] = str(math.ceil(1e3 * seconds))
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def error_json(error: RequestError) -> str:
    """The same body for a stream that has begun. ASCII: no line separator can break a frame."""
    return json.dumps(error.body())


def failure_of(why: str | None) -> RequestError:
    """What a choice that ended with finish_reason "error" comes to, by its `error`."""
    if why in set(Late):
        return DeadlineExceeded(str(why), None, "deadline_exceeded")
    return RequestError(why or "the engine failed on this request", None, "generation_failed")


def answer_to(path: str, error: RequestError) -> JSONResponse:
    """In the shape that the path's clients know."""
    response = error_response(error)
    if not path.endswith(_ANTHROPIC):
        return response
    retry = response.headers.get("Retry-After")
    headers = {} if retry is None else {"Retry-After": retry}
    return JSONResponse(anthropic_error(error.status, error.message), error.status, headers)


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


async def on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return answer_to(request.url.path, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in our shape."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"there is no endpoint {path}",
        405: f"{request.method} is not allowed on {path}",
    }.get(error.status_code, error.detail)
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    shown = anthropic_error(error.status_code, message) if path.endswith(_ANTHROPIC) else None
    return JSONResponse(
        shown or {"error": body}, status_code=error.status_code, headers=error.headers
    )


def invalid_body(error: ValidationError) -> InvalidRequest:
    """The first wrong field, in the client's words; a union's complaints are joined."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = _path(problems[0]["loc"])
    # Of a union's members, the one that got deepest into the value is what the client meant.
    paths = [_path(p["loc"]) for p in problems]
    field = max((p for p in paths if _is_within(p, first)), key=len)
    same = [p for p, path in zip(problems, paths, strict=True) if path == field]
    if same[0]["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {field!r}", field, "unknown_parameter")
    if same[0]["type"] == "missing":
        return InvalidRequest(f"{field} is required", field)
    complaints = dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in same)
    text = " or ".join(complaints)
    return InvalidRequest(f"{field}: {text[:1].lower()}{text[1:]}", field)


def renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """`error` with our field's name replaced by the one that the client wrote."""
    name = names.get(error.param or "")
    if name is None or error.param is None:
        return error
    return InvalidRequest(error.message.replace(error.param, name), name, error.code)


def _is_within(path: str, outer: str) -> bool:
    return path == outer or path.startswith((f"{outer}[", f"{outer}."))


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content` from pydantic's location; its names of union members are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _UNION_MEMBERS and "[" not in part and not part[:1].isupper():
            path += f".{part}" if path else part
    return path


_UNION_MEMBERS = frozenset({"str", "int", "float", "bool"})
"""Besides classes, whose names begin with a capital."""
