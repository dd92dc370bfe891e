"""/v1/completions: prompts as text or token ids, several at once, streamed or whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.generation import Outputs, Progress, collect, generate
from torchweave_ray.api.openai.chunks import ChunkWriter, Identity
from torchweave_ray.api.openai.detailed_chunks import DetailedWriter, StreamDetails
from torchweave_ray.api.openai.schema import CompletionBody, OpenAIBody
from torchweave_ray.api.openai.text_shapes import (
    DetailedTextShape,
    Prompt,
    Shown,
    TextShape,
    choice_json,
    likeliest,
)
from torchweave_ray.api.pacing import at_intervals, without_answer
from torchweave_ray.api.schema import MAX_CHOICES, parse
from torchweave_ray.api.service import Model, Service
from torchweave_ray.api.sse import EventStream, Writer
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import GenerateRequest


class CompletionsApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> ASGIApp:
        body = parse(CompletionBody, call)
        check_stream(body)
        _check_choices(body)
        model = await self._service.model(body.model)
        given = _prompts(body)
        requests = self._requests(
            call, body, model, [await self._encode(model, prompt) for prompt in given]
        )
        requests = await self._service.constrain(model, body.wanted(), requests)
        prompts = [
            Prompt(_text(prompt, model) if body.echo else "", request.prompt_token_ids)
            for prompt, request in zip(given, requests, strict=True)
        ]
        progress = Progress(call, model.info.id)
        outputs = generate(call, self._service, requests, bool(body.stream))
        if body.max_tokens == 0:
            outputs = without_answer(outputs)
        if body.stream:
            writer = _writer(call, body, model, prompts, progress)
            outputs = paced(outputs, body)
            return EventStream(call, outputs, writer, self._service.settings.ping_interval_s)
        return await self._whole(call, body, model, prompts, progress, outputs)

    async def _whole(
        self,
        call: Call,
        body: CompletionBody,
        model: Model,
        prompts: Sequence[Prompt],
        progress: Progress,
        outputs: Outputs,
    ) -> ASGIApp:
        n, drawn = body.n or 1, body.best_of or body.n or 1
        choices = await collect(outputs, progress, len(prompts), drawn)
        shown = _shown(body)
        answers: list[dict[str, Any]] = []
        for i, prompt in enumerate(prompts):
            own = choices[i * drawn : (i + 1) * drawn]
            for choice in likeliest(own, n) if drawn > n else own:
                answers.append(choice_json(model.tokenizer, len(answers), choice, prompt, shown))
        answer = {
            **identity_of(call, f"cmpl-{call.id}", model).head("text_completion"),
            "choices": answers,
            "usage": progress.usage_json(),
            "timings": progress.timings_json(),
        }
        return JSONResponse(answer, headers=call.headers)

    async def _encode(self, model: Model, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._service.encode(model, prompt, "prompt")
        return tuple(prompt)

    def _requests(
        self, call: Call, body: CompletionBody, model: Model, prompts: list[tuple[int, ...]]
    ) -> list[GenerateRequest]:
        n, drawn = body.n or 1, body.best_of or body.n or 1
        fields = body.sampling_fields(model.tokenizer)
        prompt_logprobs = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            prompt_logprobs = max(prompt_logprobs or 0, body.logprobs)
        logprobs = body.logprobs
        if drawn > n and logprobs is None:
            logprobs = 0  # the choice goes by them
        # To score the prompt alone, one token is drawn and not shown.
        max_tokens = 1 if body.max_tokens == 0 else body.max_tokens
        fields["prompt_logprobs"] = prompt_logprobs
        sampling = self._service.sampling(call.id, fields, max_tokens, logprobs)
        return self._service.requests(
            model,
            f"cmpl-{call.id}",
            prompts,
            sampling,
            n=drawn,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            seeded=body.seed is not None or self._service.settings.seed is not None,
        )


def check_stream(body: OpenAIBody) -> None:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequest(
            "continuous_usage_stats needs include_usage", "stream_options.continuous_usage_stats"
        )
    if body.stream_interval is not None and not body.stream:
        raise InvalidRequest("stream_interval needs stream: true", "stream_interval")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs cannot be streamed", "prompt_logprobs")


def details_of(body: OpenAIBody) -> StreamDetails:
    options = body.stream_options
    return StreamDetails(
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
    )


def paced(outputs: Outputs, body: OpenAIBody) -> Outputs:
    return at_intervals(outputs, body.stream_interval) if body.stream_interval else outputs


def identity_of(call: Call, answer_id: str, model: Model) -> Identity:
    """Equal fingerprints promise equal text for equal seeds."""
    return Identity(answer_id, call.created, model.info.id, f"fp_{model.info.numerics_id}")


def _writer(
    call: Call,
    body: CompletionBody,
    model: Model,
    prompts: Sequence[Prompt],
    progress: Progress,
) -> Writer:
    identity, details = identity_of(call, f"cmpl-{call.id}", model), details_of(body)
    n = body.n or 1
    if not (body.echo or details.token_ids or details.continuous_usage):
        return ChunkWriter(identity, TextShape(model.tokenizer), progress, n, details.include_usage)
    shape = DetailedTextShape(model.tokenizer, prompts, n, _shown(body))
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return DetailedWriter(identity, shape, progress, n, num_prompt_tokens, details)


def _shown(body: CompletionBody) -> Shown:
    return Shown(
        echo=bool(body.echo),
        logprobs=body.logprobs is not None,
        prompt_logprobs=body.prompt_logprobs is not None,
        token_ids=bool(body.return_token_ids),
    )


def _check_choices(body: CompletionBody) -> None:
    n, best_of = body.n or 1, body.best_of
    if best_of is not None and best_of < n:
        raise InvalidRequest("best_of must be at least n", "best_of")
    if best_of is not None and best_of > n and body.stream:
        raise InvalidRequest("best_of above n cannot be streamed", "best_of")
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise InvalidRequest("max_tokens must be at least 1, got 0", "max_tokens")


def _text(prompt: str | list[int], model: Model) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt, False)


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts of one body, none of them empty; raises InvalidRequest."""
    given = body.prompt
    prompts: list[Any]
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        prompts = [given]
    else:
        prompts = list(given)
    if not prompts or not all(prompts):
        raise InvalidRequest("prompt must not be empty", "prompt")
    if len(prompts) * (body.best_of or body.n or 1) > MAX_CHOICES:
        raise InvalidRequest(f"prompts times n must be at most {MAX_CHOICES}", "prompt")
    return prompts
