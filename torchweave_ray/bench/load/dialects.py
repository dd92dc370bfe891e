"""What the load generator says and how it reads the answer: OpenAI's API and the native one.

Token counts come from the server's usage, never from characters or events: an answer without
usage is a failed request. Runs after the clock has stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torchweave_ray.bench.load.http_client import Exchange

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; `at` is when its last byte arrived."""

    at: float
    name: str
    data: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request brought."""

    text_times: tuple[float, ...]
    """Arrival of every event that carried text; () when the answer came in one piece."""
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    text: str = ""


class BadAnswer(Exception):
    """The answer is an error, or says too little to be counted."""


class Dialect(Protocol):
    @property
    def path(self) -> str: ...

    def body(self, said: Sequence[Prompt], output_len: int) -> dict[str, Any]:
        """`said`: prompt, answer, prompt, ..., the last one to be answered."""
        ...

    def read(self, exchange: Exchange) -> Answer:
        """Raises BadAnswer."""
        ...


def as_one_text(said: Sequence[Prompt]) -> Prompt:
    """A conversation as one prompt. Answers bring their own leading space."""
    if len(said) == 1:
        return said[0]
    texts = [str(part) for part in said]
    return "".join(text + " " * (i % 2) for i, text in enumerate(texts))


def events(exchange: Exchange) -> Iterator[Event]:
    """The server-sent events of a body, joined over chunk borders."""
    rest = b""
    for at, payload in exchange.chunks:
        parts = (rest + payload).replace(b"\r\n", b"\n").split(b"\n\n")
        rest = parts.pop()
        for part in parts:
            yield _event(at, part.decode("utf-8"))


def _event(at: float, block: str) -> Event:
    name, data = "message", []
    for line in block.split("\n"):
        field, _, value = line.partition(":")
        if field == "event":
            name = value.strip()
        elif field == "data":
            data.append(value.removeprefix(" "))
    return Event(at, name, "\n".join(data))


@dataclass(frozen=True, slots=True)
class Completions:
    """POST /v1/completions of any OpenAI-compatible server."""

    model: str
    path: str = "/v1/completions"

    def body(self, said: Sequence[Prompt], output_len: int) -> dict[str, Any]:
        return {"prompt": as_one_text(said), **_openai_fields(self.model, output_len)}

    def read(self, exchange: Exchange) -> Answer:
        return _read_openai(exchange, lambda choice: choice.get("text"))


@dataclass(frozen=True, slots=True)
class Chat:
    """POST /v1/chat/completions: prompts are the user's messages, the template adds to them."""

    model: str
    path: str = "/v1/chat/completions"

    def body(self, said: Sequence[Prompt], output_len: int) -> dict[str, Any]:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return {"messages": messages, **_openai_fields(self.model, output_len)}

    def read(self, exchange: Exchange) -> Answer:
        return _read_openai(exchange, lambda choice: choice["delta"].get("content"))


def _openai_fields(model: str, output_len: int) -> dict[str, Any]:
    return {
        "model": model,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read_openai(exchange: Exchange, text_of: Any) -> Answer:
    _refuse_error_status(exchange)
    times: list[float] = []
    texts: list[str] = []
    usage: Mapping[str, Any] | None = None
    for event in events(exchange):
        if not event.data or event.data == "[DONE]":
            continue
        chunk = _json(event.data)
        if "error" in chunk:
            raise BadAnswer(f"error in the stream: {event.data[:200]}")
        if text := "".join(text_of(choice) or "" for choice in chunk.get("choices", ())):
            times.append(event.at)
            texts.append(text)
        usage = chunk.get("usage") or usage
    return _answer(times, usage, "".join(texts))


@dataclass(frozen=True, slots=True)
class Native:
    """POST /v1/generate: `event: ttft`, data pieces, `event: done` with the usage."""

    path: str = "/v1/generate"

    def body(self, said: Sequence[Prompt], output_len: int) -> dict[str, Any]:
        return _native_fields(as_one_text(said), output_len)

    def read(self, exchange: Exchange) -> Answer:
        _refuse_error_status(exchange)
        times: list[float] = []
        texts: list[str] = []
        usage: Mapping[str, Any] | None = None
        for event in events(exchange):
            if event.name == "error":
                raise BadAnswer(f"error in the stream: {event.data[:200]}")
            if event.name == "done":
                usage = _json(event.data).get("usage")
            elif event.name in ("message", "json") and event.data:
                times.append(event.at)
                texts.append(event.data if event.name == "message" else json.loads(event.data))
        return _answer(times, usage, "".join(texts))


@dataclass(frozen=True, slots=True)
class NativeUnbatched:
    """POST /v1/generate_nobatch: one JSON object, so there is no first token to time."""

    path: str = "/v1/generate_nobatch"

    def body(self, said: Sequence[Prompt], output_len: int) -> dict[str, Any]:
        return _native_fields(as_one_text(said), output_len)

    def read(self, exchange: Exchange) -> Answer:
        _refuse_error_status(exchange)
        body = _json(exchange.body.decode("utf-8"))
        return _answer([], body.get("usage"), str(body.get("text", "")))


def _native_fields(prompt: Prompt, output_len: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_new_tokens": output_len, "temperature": 0, "ignore_eos": True}


def _refuse_error_status(exchange: Exchange) -> None:
    if exchange.status != 200:
        text = exchange.body.decode("utf-8", "replace")[:200]
        raise BadAnswer(f"HTTP {exchange.status}: {text}")


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadAnswer(f"not JSON: {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise BadAnswer(f"not a JSON object: {text[:200]!r}")
    return value


def _answer(times: list[float], usage: Mapping[str, Any] | None, text: str) -> Answer:
    if not usage or "completion_tokens" not in usage:
        raise BadAnswer("the answer has no usage, so its tokens cannot be counted")
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or usage.get("cached_tokens") or 0
    prompt_tokens, output_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    return Answer(tuple(times), prompt_tokens, output_tokens, int(cached), text)
