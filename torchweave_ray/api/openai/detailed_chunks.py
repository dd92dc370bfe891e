"""Chunks of a stream that shows more than text: token ids, the prompt, usage as it grows, parts.

What `chunks.ChunkWriter` does, for the requests that ask for more; those that don't pay nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torchweave_ray.api.generation import Progress
from torchweave_ray.api.openai.chunks import Identity, compact, end_of_stream, error_chunk
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import ChoiceDelta, RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Fragment:
    """What is particular to one chunk."""

    content: dict[str, Any]
    """Keys of the choice: its text or delta, and whatever else stands beside it."""
    logprobs: dict[str, Any] | None = None
    beside: dict[str, Any] | None = None
    """Keys of the chunk itself."""


PromptLogprobs = tuple[TokenLogprobs | None, ...]


class DetailedShape(Protocol):
    """One protocol's chunks. `index` counts the choices of all prompts."""

    kind: str

    def opening(self, index: int, prompt_logprobs: PromptLogprobs) -> Iterator[Fragment]:
        """Before a choice's first news."""
        ...

    def news(self, index: int, delta: ChoiceDelta) -> Iterator[Fragment]: ...

    def ending(self, index: int, delta: ChoiceDelta) -> tuple[Fragment, str]:
        """The last fragment and the finish reason."""
        ...

    @property
    def nothing(self) -> dict[str, Any]:
        """Content without text."""
        ...


@dataclass(frozen=True, slots=True)
class StreamDetails:
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False


class DetailedWriter:
    """A `Writer`."""

    def __init__(
        self,
        identity: Identity,
        shape: DetailedShape,
        progress: Progress,
        num_choices: int,
        num_prompt_tokens: int,
        details: StreamDetails,
    ) -> None:
        """`num_prompt_tokens`: of all prompts, for the usage before the end."""
        self._shape = shape
        self._progress = progress
        self._n = num_choices
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._details = details
        self._identity = identity
        self._head = compact(identity.head(shape.kind))[:-1]
        self._opened: set[int] = set()
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._progress.note(output)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt_index] = output.prompt_logprobs
        chunks: list[str] = []
        for delta in output.deltas:
            index = prompt_index * self._n + delta.index
            if index not in self._opened:
                self._opened.add(index)
                scores = self._prompt_logprobs.get(prompt_index, ())
                chunks += [self._chunk(index, f) for f in self._shape.opening(index, scores)]
            self._num_tokens += len(delta.token_ids)
            chunks += self._news(index, delta)
        return "".join(chunks).encode()

    def end(self) -> bytes:
        head = self._identity.head(self._shape.kind) if self._details.include_usage else None
        return end_of_stream(self._progress, head)

    def error(self, error: RequestError) -> bytes:
        return error_chunk(error)

    def _news(self, index: int, delta: ChoiceDelta) -> Iterator[str]:
        token_ids = list(delta.token_ids) if self._details.token_ids else []
        for fragment in self._shape.news(index, delta):
            yield self._chunk(index, fragment, token_ids)
            token_ids = []
        if delta.finish_reason is not None:
            fragment, reason = self._shape.ending(index, delta)
            yield self._chunk(index, fragment, token_ids, (reason, delta.stop_reason))
        elif token_ids:
            yield self._chunk(index, Fragment(self._shape.nothing), token_ids)

    def _chunk(
        self,
        index: int,
        fragment: Fragment,
        token_ids: list[int] | None = None,
        finish: tuple[str, str | int | None] | None = None,
    ) -> str:
        choice: dict[str, Any] = {"index": index, **fragment.content}
        choice["logprobs"] = fragment.logprobs
        choice["finish_reason"] = None if finish is None else finish[0]
        if finish is not None:
            choice["stop_reason"] = finish[1]
        if token_ids:
            choice["token_ids"] = token_ids
        rest = dict(fragment.beside or {})
        if self._details.continuous_usage:
            rest["usage"] = self._usage_so_far()
        elif self._details.include_usage:
            rest["usage"] = None
        tail = f",{compact(rest)[1:]}" if rest else "}"
        return f'data: {self._head},"choices":[{compact(choice)}]{tail}\n\n'

    def _usage_so_far(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_tokens,
        }
