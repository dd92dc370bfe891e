"""/v1/completions: prompts as text or token ids, several at once, streamed or whole."""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.generation import Choice, Progress, collect, generate
from torchweave_ray.api.openai.chunks import ChunkWriter, Identity
from torchweave_ray.api.openai.logprobs import completion_logprobs
from torchweave_ray.api.openai.schema import CompletionBody, OpenAIBody
from torchweave_ray.api.schema import MAX_CHOICES, parse
from torchweave_ray.api.service import Model, Service
from torchweave_ray.api.sse import EventStream
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import ChoiceDelta
from torchweave_ray.tokenizer import Tokenizer


class CompletionsApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> ASGIApp:
        body = parse(CompletionBody, call)
        check_stream_options(body)
        n = body.n or 1
        prompts = _prompts(body, n)
        model = await self._service.model(body.model)
        sampling = self._service.sampling(body.sampling_fields(), body.max_tokens, body.logprobs)
        requests = self._service.requests(
            model,
            f"cmpl-{call.id}",
            [await self._encode(model, prompt) for prompt in prompts],
            sampling,
            n=n,
            cache_salt=body.cache_salt or "",
            seeded=body.seed is not None or self._service.settings.seed is not None,
        )
        requests = await self._service.constrain(model, body.wanted(), requests)
        identity = identity_of(f"cmpl-{call.id}", model)
        progress = Progress(call, model.info.id)
        outputs = generate(call, self._service.backend, requests)
        if body.stream:
            writer = ChunkWriter(
                identity, _TextShape(model.tokenizer), progress, n, includes_usage(body)
            )
            interval = self._service.settings.ping_interval_s
            return EventStream(call, outputs, writer, interval)
        choices = await collect(outputs, progress, len(requests), n)
        answer = {
            **identity.head("text_completion"),
            "choices": [_choice_json(model, i, choice) for i, choice in enumerate(choices)],
            "usage": progress.usage_json(),
            "timings": progress.timings_json(),
        }
        return JSONResponse(answer, headers=call.headers)

    async def _encode(self, model: Model, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._service.encode(model, prompt, "prompt")
        return tuple(prompt)


def check_stream_options(body: OpenAIBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")


def includes_usage(body: OpenAIBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def identity_of(call_id: str, model: Model) -> Identity:
    """Equal fingerprints promise equal text for equal seeds."""
    return Identity(call_id, int(time.time()), model.info.id, f"fp_{model.info.numerics_id}")


def _prompts(body: CompletionBody, n: int) -> list[str | list[int]]:
    """The prompts of one body, none of them empty; raises InvalidRequest."""
    given = body.prompt
    prompts: list[Any]
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        prompts = [given]
    else:
        prompts = list(given)
    if not prompts or not all(prompts):
        raise InvalidRequest("prompt must not be empty", "prompt")
    if len(prompts) * n > MAX_CHOICES:
        raise InvalidRequest(f"prompts times n must be at most {MAX_CHOICES}", "prompt")
    return prompts


class _TextShape:
    kind = "text_completion"
    opening: str | None = None
    text_before = '"text":'
    text_after = ""
    empty = '"text":""'

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}

    def logprobs(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None:
        offset = self._offsets.get(index, 0)
        shown = completion_logprobs(self._tokenizer, delta.logprobs or (), offset)
        self._offsets[index] = offset + sum(map(len, shown["tokens"]))
        return shown


def _choice_json(model: Model, index: int, choice: Choice) -> dict[str, Any]:
    logprobs = completion_logprobs(model.tokenizer, choice.logprobs) if choice.logprobs else None
    return {
        "index": index,
        "text": choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
