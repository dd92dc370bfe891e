"""What the client of one request has received: the truth from which a stream resumes.

Knows no transport. A resumed choice runs as a request of its own (n = 1, seed + i) that carries
its tokens so far; its outputs are then shown under the choice's own index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from deployments.calls import Alive
from torchweave_ray.outputs import (
    FinishReason,
    GenerateRequest,
    OutputKind,
    RequestOutput,
    Usage,
)


@dataclass(slots=True)
class Choice:
    token_ids: list[int] = field(default_factory=list)
    num_chars: int = 0
    finish_reason: FinishReason | None = None


class Progress:
    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._choices = [Choice() for _ in range(request.n)]
        if request.output_token_ids or request.emitted_chars:
            first = self._choices[0]
            first.token_ids = list(request.output_token_ids)
            first.num_chars = request.emitted_chars
        self._alive: Alive | None = None
        self._change = ""
        self._num_outputs = 0
        self._cached_tokens = 0

    def renew(self, request: GenerateRequest) -> None:
        """Before any output: it is asked for otherwise."""
        self._request = request

    @property
    def can_resume(self) -> bool:
        """Only token streams can go on; anything else can at most start again from nothing."""
        return self._request.output_kind is OutputKind.TOKENS or self._num_outputs == 0

    def note(self, output: RequestOutput) -> None:
        """Take it down before it goes to the client."""
        self._num_outputs += 1
        for delta in output.deltas:
            choice = self._choices[delta.index]
            assert not delta.token_ids or delta.first_index == len(choice.token_ids), delta
            choice.token_ids += delta.token_ids
            choice.num_chars += len(delta.text)
            choice.finish_reason = delta.finish_reason or choice.finish_reason
        if output.usage is not None:
            self._cached_tokens += output.usage.cached_tokens

    def taken_by(self, alive: Alive) -> None:
        """Only equal numerics ids promise the text that the first replica would have given."""
        if self._alive is not None and any(choice.token_ids for choice in self._choices):
            if alive.artifact_id != self._alive.artifact_id:
                return  # it refuses: another model's tokens would not be a continuation
            if alive.numerics_id != self._alive.numerics_id:
                self._change = alive.numerics_id
        self._alive = alive

    def take_change(self) -> str:
        """The numerics id under which a stream that has begun goes on, if it is another; once."""
        change, self._change = self._change, ""
        return change

    def unfinished(self, attempt: int) -> Iterator[tuple[int | None, GenerateRequest]]:
        """What is left to ask for: (choice's index, its request), or (None, the whole again)."""
        request = self._request
        if self._alive is not None:
            request = replace(request, artifact_id=self._alive.artifact_id or request.artifact_id)
        if not any(choice.token_ids or choice.finish_reason for choice in self._choices):
            yield None, replace(request, request_id=f"{request.request_id}.{attempt}")
            return
        for index, choice in enumerate(self._choices):
            if choice.finish_reason is None:
                yield (
                    index,
                    replace(
                        request,
                        request_id=f"{request.request_id}.{attempt}.{index}",
                        n=1,
                        sampling=replace(request.sampling, seed=request.sampling.seed + index),
                        output_token_ids=tuple(choice.token_ids),
                        emitted_chars=choice.num_chars,
                    ),
                )

    def usage(self) -> Usage:
        """Exact, from what was received."""
        return Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=sum(len(choice.token_ids) for choice in self._choices),
            cached_tokens=self._cached_tokens,
        )
