"""Chunks of an OpenAI stream. What all chunks of a request share is rendered once, not per token.

A shape (text completion or chat) says how text and its log-probabilities are written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from torchweave_ray.api.errors import error_json
from torchweave_ray.api.generation import Progress
from torchweave_ray.api.sse import json_string
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import ChoiceDelta, RequestOutput

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Identity:
    """What every chunk, and the whole answer, says of itself."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class Shape(Protocol):
    kind: str
    opening: str | None
    """What a choice's first chunk holds before any text; None: there is no such chunk."""
    text_before: str
    """Around the JSON string of a piece of text."""
    text_after: str
    empty: str
    """In place of all that when a choice ends."""

    def logprobs(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None: ...


class ChunkWriter:
    def __init__(
        self,
        identity: Identity,
        shape: Shape,
        progress: Progress,
        num_choices: int,
        include_usage: bool,
    ) -> None:
        self._shape = shape
        self._progress = progress
        self._n = num_choices
        self._include_usage = include_usage
        self._identity = identity
        head = compact(identity.head(shape.kind))[:-1]
        self._head = f'data: {head},"choices":[{{"index":'
        usage = ',"usage":null' if include_usage else ""
        self._tail = f"}}]{usage}}}\n\n"
        self._plain_tail = f'{shape.text_after},"logprobs":null,"finish_reason":null{self._tail}'
        self._text_heads: dict[int, str] = {}
        """By choice: all before the text. Also: the choices that were opened."""

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._progress.note(output)
        chunks = ""
        for delta in output.deltas:
            index = prompt_index * self._n + delta.index
            text_head = self._text_heads.get(index)
            if text_head is None:
                text_head = f"{self._head}{index},{self._shape.text_before}"
                self._text_heads[index] = text_head
                if self._shape.opening is not None:
                    chunks += self._chunk(index, self._shape.opening)
            if delta.logprobs:
                logprobs = compact(self._shape.logprobs(index, delta))
                text = f"{self._shape.text_before}{json_string(delta.text)}{self._shape.text_after}"
                chunks += self._chunk(index, text, logprobs)
            elif delta.text:
                chunks += text_head + json_string(delta.text) + self._plain_tail
            if delta.finish_reason is not None:
                chunks += self._chunk(
                    index,
                    self._shape.empty,
                    "null",
                    f'"{delta.finish_reason}","stop_reason":{json.dumps(delta.stop_reason)}',
                )
        return chunks.encode()

    def end(self) -> bytes:
        head = self._identity.head(self._shape.kind) if self._include_usage else None
        return end_of_stream(self._progress, head)

    def error(self, error: RequestError) -> bytes:
        return error_chunk(error)

    def _chunk(
        self, index: int, content: str, logprobs: str = "null", finish_reason: str = "null"
    ) -> str:
        return (
            f'{self._head}{index},{content},"logprobs":{logprobs},'
            f'"finish_reason":{finish_reason}{self._tail}'
        )


def end_of_stream(progress: Progress, usage_head: dict[str, Any] | None) -> bytes:
    """`usage_head`: the head of a last chunk with the usage; None: there is no such chunk."""
    last = b""
    if usage_head is not None:
        counts = {"usage": progress.usage_json(), "timings": progress.timings_json()}
        last = f"data: {compact({**usage_head, 'choices': [], **counts})}\n\n".encode()
    return last + (DONE if progress.failure is None else error_chunk(progress.failure))


def error_chunk(error: RequestError) -> bytes:
    """OpenAI's clients raise APIError when they read it."""
    return f"data: {error_json(error)}\n\n".encode() + DONE


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
