"""/v1/chat/completions: the model's own template makes the prompt of the messages."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.chat.prompt import Conversation, lacks_strictness
from torchweave_ray.api.chat.turn import Turn, TurnOptions, take_turn
from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import renamed
from torchweave_ray.api.generation import Outputs, Progress, collect, generate
from torchweave_ray.api.openai.chat_shapes import ChatShape, DetailedChatShape, choice_json
from torchweave_ray.api.openai.chunks import ChunkWriter
from torchweave_ray.api.openai.completions import check_stream, details_of, identity_of, paced
from torchweave_ray.api.openai.detailed_chunks import DetailedWriter
from torchweave_ray.api.openai.logprobs import prompt_logprobs_json
from torchweave_ray.api.openai.schema import ChatBody, ConversationBody
from torchweave_ray.api.openai.schema_messages import NamedTool
from torchweave_ray.api.schema import parse
from torchweave_ray.api.service import Model, Service
from torchweave_ray.api.sse import EventStream, Writer
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.tokenizer import Tokenizer


class ChatApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> ASGIApp:
        body = parse(ChatBody, call)
        check_stream(body)
        model = await self._service.model(body.model)
        turn = await self._turn(call, body, model)
        progress = Progress(call, model.info.id)
        outputs = generate(call, self._service, [turn.request], bool(body.stream))
        if body.stream:
            writer = _writer(call, body, model, turn, progress)
            outputs = paced(outputs, body)
            return EventStream(call, outputs, writer, self._service.settings.ping_interval_s)
        return await _whole(call, body, model, turn, progress, outputs)

    async def _turn(self, call: Call, body: ChatBody, model: Model) -> Turn:
        max_tokens, name = _max_tokens(body)
        fields = body.sampling_fields(model.tokenizer)
        options = TurnOptions(
            sampling={**fields, "prompt_logprobs": body.prompt_logprobs},
            max_tokens=max_tokens,
            logprobs=_logprobs(body),
            n=body.n or 1,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            wanted=body.wanted(),
        )
        conversation = conversation_of(body, model.tokenizer, call, options.wanted is not None)
        try:
            return await take_turn(
                self._service, model, f"chatcmpl-{call.id}", conversation, options
            )
        except InvalidRequest as error:
            raise renamed(error, {"max_tokens": name, "logprobs": "top_logprobs"}) from None


async def _whole(
    call: Call, body: ChatBody, model: Model, turn: Turn, progress: Progress, outputs: Outputs
) -> ASGIApp:
    request = turn.request
    choices = await collect(outputs, progress, num_prompts=1, n=request.n)
    tokenizer, shows_ids = model.tokenizer, bool(body.return_token_ids)
    answer = {
        **identity_of(call, request.request_id, model).head("chat.completion"),
        "choices": [
            choice_json(tokenizer, index, choice, turn.new_parser, shows_ids)
            for index, choice in enumerate(choices)
        ],
        "usage": progress.usage_json(),
        "timings": progress.timings_json(),
    }
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs_json(tokenizer, choices[0].prompt_logprobs)
    if shows_ids:
        answer["prompt_token_ids"] = list(request.prompt_token_ids)
    return JSONResponse(answer, headers=call.headers)


def _writer(call: Call, body: ChatBody, model: Model, turn: Turn, progress: Progress) -> Writer:
    request, tokenizer = turn.request, model.tokenizer
    identity, details = identity_of(call, request.request_id, model), details_of(body)
    if turn.is_plain and not (details.token_ids or details.continuous_usage):
        shape = ChatShape(tokenizer)
        return ChunkWriter(identity, shape, progress, request.n, details.include_usage)
    prompt = request.prompt_token_ids
    detailed = DetailedChatShape(tokenizer, turn.new_parser, prompt if details.token_ids else None)
    return DetailedWriter(identity, detailed, progress, request.n, len(prompt), details)


def conversation_of(
    body: ConversationBody, tokenizer: Tokenizer, call: Call, is_constrained: bool = False
) -> Conversation:
    """Raises InvalidRequest for tools that contradict each other."""
    tools = [tool.for_template() for tool in body.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools: two functions have the same name", "tools")
    choice = body.tool_choice or "auto"
    if isinstance(choice, NamedTool):
        name = choice.function.name
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise InvalidRequest(f"tool_choice: there is no tool {name!r}", "tool_choice")
    must_call = choice not in ("none", "auto")
    if must_call and not tools:
        raise InvalidRequest("tool_choice needs tools", "tool_choice")
    conversation = Conversation(
        [message.for_template() for message in body.messages],
        tools=[] if choice == "none" else tools,
        must_call=must_call,
        is_strict=any(tool.function.strict for tool in body.tools or ()),
        is_constrained=is_constrained,
        parallel_calls=body.parallel_tool_calls is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
        thinking_token_budget=body.thinking_token_budget,
        shows_reasoning=body.include_reasoning is not False,
    )
    if lacks_strictness(tokenizer, conversation):
        call.ignored.append("tools.function.strict")
    return conversation


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
