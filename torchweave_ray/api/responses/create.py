"""POST /v1/responses, whole and streamed."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.chat.blocks import blocks_of
from torchweave_ray.api.chat.prompt import Conversation, lacks_strictness
from torchweave_ray.api.chat.turn import TurnOptions, take_turn
from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import renamed
from torchweave_ray.api.generation import Progress, collect, generate
from torchweave_ray.api.grammar import Wanted
from torchweave_ray.api.responses.events import ResponseWriter
from torchweave_ray.api.responses.schema import NamedTool, ResponsesBody, plain_messages
from torchweave_ray.api.responses.shapes import ResponseShape
from torchweave_ray.api.schema import parse
from torchweave_ray.api.service import Service
from torchweave_ray.api.sse import EventStream
from torchweave_ray.errors import InvalidRequest


class ResponsesApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> ASGIApp:
        body = parse(ResponsesBody, call)
        model = await self._service.model(body.model)
        options = TurnOptions(
            sampling=body.sampling_fields(model.tokenizer),
            max_tokens=body.max_output_tokens,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            prompt_param="input",
            wanted=_wanted(body),
        )
        conversation = _conversation(body)
        if lacks_strictness(model.tokenizer, conversation):
            call.ignored.append("tools.strict")
        try:
            turn = await take_turn(self._service, model, f"resp_{call.id}", conversation, options)
        except InvalidRequest as error:
            raise renamed(error, {"max_tokens": "max_output_tokens"}) from None
        progress = Progress(call, model.info.id)
        outputs = generate(call, self._service, [turn.request], bool(body.stream))
        shape = ResponseShape(body, turn.request.request_id, call.created, model.info.id)
        if body.stream:
            writer = ResponseWriter(shape, turn.new_parser(), progress)
            return EventStream(call, outputs, writer, self._service.settings.ping_interval_s)
        (choice,) = await collect(outputs, progress, num_prompts=1, n=1)
        parser = turn.new_parser()
        blocks = blocks_of([*parser.feed(choice.text), *parser.finish()])
        answer = shape.closed(blocks, choice.finish_reason, progress)
        return JSONResponse(answer, headers=call.headers)


def _conversation(body: ResponsesBody) -> Conversation:
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "parameters": tool.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in body.tools or ()
    ]
    choice = body.tool_choice or "auto"
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if _name(tool) == choice.name]
    must_call = choice not in ("none", "auto")
    if must_call and not tools:
        raise InvalidRequest("tool_choice: there is no such tool", "tool_choice")
    messages = plain_messages(body)
    if not messages:
        raise InvalidRequest("input must not be empty", "input")
    return Conversation(
        messages,
        is_constrained=_wanted(body) is not None,
        tools=[] if choice == "none" else tools,
        is_strict=any(tool.strict for tool in body.tools or ()),
        must_call=must_call,
        parallel_calls=body.parallel_tool_calls is not False,
        thinking_token_budget=body.thinking_token_budget,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
    )


def _wanted(body: ResponsesBody) -> Wanted | None:
    chosen = body.text.format if body.text is not None else None
    return None if chosen is None else chosen.wanted()


def _name(tool: dict[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name
