"""OpenAI's batch files: one request a line in, one result a line out, in the same order.

Knows neither how a request is answered nor where results are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchweave_ray.errors import InvalidRequest

URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
)
KNOWN_KEYS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class BatchRequest:
    url: str
    body: bytes
    """JSON, to be posted as it is."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """It never becomes a request: its result has an `error` and no `response`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    key: str
    """Of its place and bytes: a line that was edited is another one, and is done again."""
    custom_id: str | None
    wanted: BatchRequest | BadLine


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    request_id: str
    body: bytes
    retry_after: float | None = None
    """Seconds, where the answer says so."""


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that is not blank."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for index, raw in enumerate(file):
            if raw.strip():
                line = parse_line(index, raw.strip())
                if line.custom_id is not None and line.custom_id in seen:
                    duplicate = f"line {index + 1}: an earlier line has this custom_id"
                    line = Line(line.key, line.custom_id, BadLine("duplicate_custom_id", duplicate))
                seen.add(line.custom_id or "")
                yield line


def parse_line(index: int, raw: bytes) -> Line:
    """`index` from 0; whatever is wrong with the line becomes its BadLine."""
    key = hashlib.sha256(b"%d:%b" % (index, raw)).hexdigest()[:24]

    def bad(code: str, message: str, custom_id: str | None = None) -> Line:
        return Line(key, custom_id, BadLine(code, f"line {index + 1}: {message}"))

    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return bad("invalid_json_line", f"not JSON: {error}")
    if not isinstance(values, dict):
        return bad("invalid_json_line", "not a JSON object")
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return bad("missing_custom_id", "custom_id must be a text that is not empty")
    if not custom_id.isprintable():  # surrogates too, which no output file could hold
        return bad("invalid_custom_id", "custom_id must be printable")
    if unknown := set(values) - KNOWN_KEYS:
        return bad("unknown_field", f"unknown field {min(unknown)!r}", custom_id)
    if values.get("method") != "POST":
        return bad("invalid_method", "method must be POST", custom_id)
    if values.get("url") not in URLS:
        return bad("invalid_url", f"url must be one of {', '.join(URLS)}", custom_id)
    body = values.get("body")
    if not isinstance(body, dict):
        return bad("invalid_body", "body must be a JSON object", custom_id)
    return Line(key, custom_id, BatchRequest(values["url"], json.dumps(body).encode()))


def refusal(request: BatchRequest) -> Answer | None:
    """Of what is right over HTTP and cannot be in a file: a stream."""
    if not json.loads(request.body).get("stream"):
        return None
    error = InvalidRequest("a batch cannot stream", "stream")
    return Answer(error.status, "", json.dumps(error.body()).encode())


def result_of(line: Line, answer: Answer | BadLine) -> dict[str, Any]:
    """The line's result as OpenAI writes it."""
    response: dict[str, Any] | None = None
    if isinstance(answer, Answer):
        try:
            body = json.loads(answer.body)
        except ValueError:
            text = answer.body[:200].decode(errors="replace")
            answer = BadLine("invalid_answer", f"status {answer.status}, not JSON: {text!r}")
        else:
            response = {
                "status_code": answer.status,
                "request_id": answer.request_id,
                "body": body,
            }
    error = None
    if isinstance(answer, BadLine):
        error = {"code": answer.code, "message": answer.message}
    return {
        "id": f"batch_req_{line.key}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }


def has_failed(result: dict[str, Any]) -> bool:
    return result["response"] is None or result["response"]["status_code"] != 200


def num_output_tokens(result: dict[str, Any]) -> int:
    """By the answer's own usage; 0 where it has none."""
    body = result["response"] and result["response"]["body"]
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return 0
    return int(usage.get("completion_tokens") or usage.get("output_tokens") or 0)
