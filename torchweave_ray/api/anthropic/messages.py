"""/v1/messages, whole and streamed, and /v1/messages/count_tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.anthropic.events import MessageWriter
from torchweave_ray.api.anthropic.schema import CountBody, MessagesBody, plain_messages
from torchweave_ray.api.anthropic.shapes import block_json, stop_reason_of, usage_json
from torchweave_ray.api.chat.blocks import blocks_of
from torchweave_ray.api.chat.formats import marks_reasoning
from torchweave_ray.api.chat.prompt import Conversation, render
from torchweave_ray.api.chat.turn import TurnOptions, take_turn
from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import renamed
from torchweave_ray.api.generation import Progress, collect, generate
from torchweave_ray.api.schema import parse
from torchweave_ray.api.service import Model, Service
from torchweave_ray.api.sse import EventStream
from torchweave_ray.errors import InvalidRequest

_THEIR_NAMES = {"stop": "stop_sequences"}


class MessagesApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> ASGIApp:
        body = parse(MessagesBody, call)
        model = await self._service.model(body.model)
        fields: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_k", "top_p")
            if (value := getattr(body, name)) is not None
        }
        fields["stop"] = tuple(body.stop_sequences or ())
        options = TurnOptions(sampling=fields, max_tokens=body.max_tokens)
        try:
            turn = await take_turn(
                self._service, model, f"msg_{call.id}", _budgeted(call, body, model), options
            )
        except InvalidRequest as error:
            raise renamed(error, _THEIR_NAMES) from None
        progress = Progress(call, model.info.id)
        outputs = generate(call, self._service, [turn.request], bool(body.stream))
        if body.stream:
            writer = MessageWriter(turn, model.info.id, progress)
            return EventStream(call, outputs, writer, self._service.settings.ping_interval_s)
        (choice,) = await collect(outputs, progress, num_prompts=1, n=1)
        parser = turn.new_parser()
        blocks = blocks_of([*parser.feed(choice.text), *parser.finish()])
        reason, sequence = stop_reason_of(choice.finish_reason, choice.stop_reason, parser)
        answer = {
            "id": turn.request.request_id,
            "type": "message",
            "role": "assistant",
            "model": model.info.id,
            "content": [block_json(block) for block in blocks],
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage_json(progress.usage),
            "timings": progress.timings_json(),
        }
        return JSONResponse(answer, headers=call.headers)

    async def count_tokens(self, call: Call) -> ASGIApp:
        body = parse(CountBody, call)
        model = await self._service.model(body.model)
        text = render(model.tokenizer, _conversation(body)).text
        ids = await self._service.encode(model, text, "messages", add_special_tokens=False)
        return JSONResponse({"input_tokens": len(ids)}, headers=call.headers)


def _conversation(body: CountBody) -> Conversation:
    tools: list[dict[str, Any]] = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "parameters": tool.input_schema,
            },
        }
        for tool in body.tools or ()
    ]
    choice = body.tool_choice
    kind = choice.type if choice is not None else "auto"
    if choice is not None and kind == "tool":
        tools = [tool for tool in tools if tool["function"]["name"] == choice.name]
    if kind in ("any", "tool") and not tools:
        raise InvalidRequest("tool_choice: there is no such tool", "tool_choice")
    variables = {}
    if body.thinking is not None:
        variables["enable_thinking"] = body.thinking.type == "enabled"
    return Conversation(
        plain_messages(body),
        tools=[] if kind == "none" else tools,
        must_call=kind in ("any", "tool"),
        parallel_calls=choice is None or not choice.disable_parallel_tool_use,
        variables=variables,
        continue_final_message=_is_prefilled(body),
    )


def _budgeted(call: Call, body: CountBody, model: Model) -> Conversation:
    """With thinking's limit. Anthropic's clients cannot ask for thinking without one, whatever
    the model; one that marks none keeps to it and is not refused."""
    conversation = _conversation(body)
    thinking = body.thinking
    if thinking is None or thinking.budget_tokens is None:
        return conversation
    if thinking.type == "disabled" or not marks_reasoning(model.tokenizer.chat_template or ""):
        call.ignored.append("thinking.budget_tokens")
        return conversation
    return replace(conversation, thinking_token_budget=thinking.budget_tokens)


def _is_prefilled(body: CountBody) -> bool:
    """An assistant's message at the end is the beginning of the answer."""
    last = body.messages[-1]
    blocks = () if isinstance(last.content, str) else last.content
    return last.role == "assistant" and all(block.type == "text" for block in blocks)
