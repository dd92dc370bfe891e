"""/v1/chat/completions: the model's own template makes the prompt of the messages."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import renamed
from torchweave_ray.api.generation import Choice, Progress, collect, generate
from torchweave_ray.api.openai.chunks import ChunkWriter
from torchweave_ray.api.openai.completions import (
    check_stream_options,
    identity_of,
    includes_usage,
)
from torchweave_ray.api.openai.logprobs import chat_logprobs
from torchweave_ray.api.openai.schema import ChatBody
from torchweave_ray.api.schema import parse
from torchweave_ray.api.service import Model, Service
from torchweave_ray.api.sse import EventStream
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import ChoiceDelta, GenerateRequest
from torchweave_ray.tokenizer import RESERVED_TEMPLATE_VARIABLES, Tokenizer


class ChatApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> ASGIApp:
        body = parse(ChatBody, call)
        check_stream_options(body)
        model = await self._service.model(body.model)
        request = await self._request(call, body, model)
        identity = identity_of(request.request_id, model)
        progress = Progress(call, model.info.id)
        outputs = generate(call, self._service.backend, [request])
        if body.stream:
            writer = ChunkWriter(
                identity, _ChatShape(model.tokenizer), progress, request.n, includes_usage(body)
            )
            interval = self._service.settings.ping_interval_s
            return EventStream(call, outputs, writer, interval)
        choices = await collect(outputs, progress, num_prompts=1, n=request.n)
        answer = {
            **identity.head("chat.completion"),
            "choices": [_choice_json(model, i, choice) for i, choice in enumerate(choices)],
            "usage": progress.usage_json(),
            "timings": progress.timings_json(),
        }
        return JSONResponse(answer, headers=call.headers)

    async def _request(self, call: Call, body: ChatBody, model: Model) -> GenerateRequest:
        chat = _render(body, model)
        # The template wrote the special tokens itself: none are added again.
        prompt = await self._service.encode(model, chat, "messages", add_special_tokens=False)
        max_tokens, name = _max_tokens(body)
        sampling = self._service.sampling(body.sampling_fields(), max_tokens, _logprobs(body))
        try:
            (request,) = self._service.requests(
                model,
                f"chatcmpl-{call.id}",
                [prompt],
                sampling,
                n=body.n or 1,
                cache_salt=body.cache_salt or "",
                prompt_param="messages",
            )
        except InvalidRequest as error:
            raise renamed(error, {"max_tokens": name, "logprobs": "top_logprobs"}) from None
        (request,) = await self._service.constrain(model, body.wanted(), [request])
        return request


def _render(body: ChatBody, model: Model) -> str:
    variables = dict(body.chat_template_kwargs or {})
    if reserved := RESERVED_TEMPLATE_VARIABLES & variables.keys():
        raise InvalidRequest(
            f"a chat template variable cannot be named {min(reserved)!r}", "chat_template_kwargs"
        )
    messages = [message.for_template() for message in body.messages]
    if body.continue_final_message:
        return model.tokenizer.render_chat(
            messages, add_generation_prompt=False, continue_final_message=True, **variables
        )
    return model.tokenizer.render_chat(messages, **variables)


def _max_tokens(body: ChatBody) -> tuple[int | None, str]:
    """The limit, and the name under which the client gave it."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens contradict each other", "max_tokens"
        )
    return (new, "max_completion_tokens") if new is not None else (old, "max_tokens")


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs is not None:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    return None


class _ChatShape:
    kind = "chat.completion.chunk"
    opening: str | None = '"delta":{"role":"assistant","content":""}'
    text_before = '"delta":{"content":'
    text_after = "}"
    empty = '"delta":{}'

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def logprobs(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, delta.logprobs or ())


def _choice_json(model: Model, index: int, choice: Choice) -> dict[str, Any]:
    logprobs = chat_logprobs(model.tokenizer, choice.logprobs) if choice.logprobs else None
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
