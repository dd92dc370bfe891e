"""/openapi.json from the schemas of the bodies, and /docs, a page of it that needs no net."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from torchweave_ray.api.endpoint import MAX_DEADLINE_MS

VERSION = "1"
_PAGE = Path(__file__).with_name("page.html")
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_DEADLINE = {
    "name": "x-deadline-ms",
    "in": "header",
    "description": "the whole answer within so many milliseconds",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
}
_STATUSES = {
    400: "a field is wrong, unknown or not supported",
    404: "no such model or request",
    413: "the body is too long",
    429: "the backlog is full; Retry-After says when to come again",
    500: "a fault of the server, or the generation failed",
    503: "no replica can answer now",
    504: "the request's deadline passed, or cannot be met",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document says of one route."""

    method: str
    path: str
    summary: str
    bodies: tuple[type[BaseModel], ...] = ()
    """Of a POST; several: one of them."""
    streams: bool = False


class ReferenceApi:
    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = tuple(operations)

    async def document(self, request: Request) -> Response:
        return Response(_document_text(self._operations), media_type="application/json")

    async def page(self, request: Request) -> Response:
        text = _PAGE.read_text()
        return HTMLResponse(text, headers=_headers(text))


@cache
def _headers(page: str) -> dict[str, str]:
    """Its own script and style run, by their hashes, and nothing else does."""
    policy = "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    for tag in ("script", "style"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"{tag}-src 'sha256-{digest}'; "
    return {
        "Content-Security-Policy": policy + "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


@cache
def _document_text(operations: tuple[Operation, ...]) -> str:
    return json.dumps(document(operations))


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    bodies = {body for operation in operations for body in operation.bodies}
    ordered = sorted(bodies, key=lambda body: body.__name__)
    _, schemas = models_json_schema(
        [(body, "validation") for body in ordered], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = operation.path.replace(":path}", "}")
        paths.setdefault(path, {})[operation.method.lower()] = _described(operation, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "TorchWeave Ray", "version": VERSION},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR, **schemas.get("$defs", {})}},
    }


def _described(operation: Operation, path: str) -> dict[str, Any]:
    good: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if operation.streams:
        good["text/event-stream"] = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "the answer", "content": good}},
    }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, description in _STATUSES.items():
        described["responses"][str(status)] = {"description": description, "content": error}
    if operation.bodies:
        schemas = [{"$ref": f"#/components/schemas/{b.__name__}"} for b in operation.bodies]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        content = {"application/json": {"schema": schema}}
        described["requestBody"] = {"required": True, "content": content}
        described["parameters"] = [_DEADLINE]
    if (start := path.find("{")) >= 0:
        name = path[start + 1 : path.index("}")]
        parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        described["parameters"] = [parameter]
    return described
