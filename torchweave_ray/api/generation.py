"""One call's engine requests, run together: merged outputs, and what the call came to.

Leaving the merged iterator early aborts every request of the call. Knows no protocol.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchweave_ray.api.access.caller import CALLER
from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import failure_of
from torchweave_ray.api.running import StopSwitch
from torchweave_ray.api.service import Service
from torchweave_ray.api.streams.event_ids import PARAM
from torchweave_ray.api.streams.merging import merged
from torchweave_ray.api.streams.resume import open_stream
from torchweave_ray.errors import InvalidRequest, RequestError, Unavailable
from torchweave_ray.outputs import (
    Backend,
    ChoiceDelta,
    FinishReason,
    GenerateRequest,
    RequestOutput,
    Timings,
    TokenLogprobs,
    Usage,
)

logger = logging.getLogger(__name__)

Outputs = AsyncGenerator[tuple[int, RequestOutput]]
"""(index of the request, its news)"""


def generate(
    call: Call, service: Service, requests: Sequence[GenerateRequest], is_stream: bool = False
) -> Outputs:
    """Closed with the call at the latest; DELETE /v1/requests/{id} can stop it, and a stream can be
    opened again.

    All have the call's session and deadline, and its caller's tenant.
    """
    caller = CALLER.get()
    requests = [
        caller.stamped(replace(request, session_id=call.session_id, deadline=call.deadline))
        for request in requests
    ]
    if is_stream:
        requests = open_stream(call, service, requests)
    elif call.resumed is not None:
        raise InvalidRequest(f"{PARAM} goes with a stream only", PARAM)
    switches = call.stack.enter_context(service.running.open(call.id, len(requests)))
    sources = [
        _Source(service.backend, request, switch, index)
        for index, (request, switch) in enumerate(zip(requests, switches, strict=True))
    ]
    each = [_one(source) for source in sources]
    outputs = each[0] if len(each) == 1 else merged(each)
    outputs = service.usage.metered(call, caller, requests, outputs)
    call.stack.push_async_callback(outputs.aclose)
    return outputs


@dataclass(frozen=True, slots=True)
class _Source:
    backend: Backend
    request: GenerateRequest
    switch: StopSwitch
    index: int


async def _one(source: _Source) -> Outputs:
    outputs = source.backend.generate(source.request)
    is_last = False
    try:
        async for output in source.switch.outputs(outputs, source.request):
            is_last = output.is_last
            yield source.index, output
    finally:
        await _close(outputs)
    if not is_last:
        raise Unavailable("the answer ended early")


async def _close(outputs: AsyncIterator[RequestOutput]) -> None:
    if isinstance(outputs, AsyncGenerator):
        await outputs.aclose()


class Progress:
    """Counts and clocks of one call; writes its line in the log when the call ends."""

    def __init__(self, call: Call, model: str) -> None:
        self._call = call
        self._model = model
        self.ttft_s: float | None = None
        """From the arrival of the HTTP request to its first token, as this process saw it."""
        self.usage = Usage(0, 0, 0)
        self.timings: Timings | None = None
        """Of the request that took longest, when there were several prompts."""
        self.failure: RequestError | None = None
        """What a choice that ended with finish_reason "error" comes to."""
        self._num_tokens = 0
        self._finish_reasons: list[FinishReason] = []
        call.stack.callback(self._log)

    def note(self, output: RequestOutput) -> None:
        for delta in output.deltas:
            self._num_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._finish_reasons.append(delta.finish_reason)
                if delta.finish_reason is FinishReason.ERROR:
                    self.failure = failure_of(delta.error)
        if self.ttft_s is None and output.deltas:
            self.ttft_s = time.monotonic() - self._call.started_at
        if (usage := output.usage) is not None:
            self.usage = Usage(
                self.usage.prompt_tokens + usage.prompt_tokens,
                self.usage.completion_tokens + usage.completion_tokens,
                self.usage.cached_tokens + usage.cached_tokens,
            )
        if (timings := output.timings) is not None and (
            self.timings is None or timings.total_s > self.timings.total_s
        ):
            self.timings = timings

    def usage_json(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }

    def timings_json(self) -> dict[str, float] | None:
        """Seconds; an extension that OpenAI's clients pass over."""
        if self.timings is None:
            return None
        queue_s, ttft_s, total_s = (
            self.timings.queue_s,
            self.timings.ttft_s,
            self.timings.total_s,
        )
        seconds = {
            "queue_s": queue_s,
            "prefill_s": ttft_s - queue_s,
            "ttft_s": ttft_s,
            "decode_s": total_s - ttft_s,
            "total_s": total_s,
        }
        return {name: round(value, 6) for name, value in seconds.items()}

    def _log(self) -> None:
        total_s = time.monotonic() - self._call.started_at
        finish = ",".join(sorted({str(reason) for reason in self._finish_reasons})) or "none"
        ttft = "none" if self.ttft_s is None else f"{self.ttft_s:.3f}s"
        logger.info(
            "[Request] id=%s model=%s ttft=%s total=%.3fs tokens=%d tokens/sec=%.1f finish=%s",
            self._call.request_id,
            self._model,
            ttft,
            total_s,
            self._num_tokens,
            self._num_tokens / total_s,
            finish,
        )


class Choice:
    """All that one choice said."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, delta: ChoiceDelta) -> None:
        self._pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


async def collect(
    outputs: AsyncIterator[tuple[int, RequestOutput]], progress: Progress, num_prompts: int, n: int
) -> list[Choice]:
    """The whole answer, choices of the first prompt first; raises when one of them failed."""
    choices = [Choice() for _ in range(num_prompts * n)]
    async for prompt_index, output in outputs:
        progress.note(output)
        for delta in output.deltas:
            choices[prompt_index * n + delta.index].add(delta)
        if output.prompt_logprobs is not None:
            for choice in choices[prompt_index * n : (prompt_index + 1) * n]:
                choice.prompt_logprobs = output.prompt_logprobs
    if progress.failure is not None:
        raise progress.failure
    return choices
