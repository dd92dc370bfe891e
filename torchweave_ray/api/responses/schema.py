"""The body of /v1/responses, and the conversation that it stands for."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from torchweave_ray.api.grammar import Wanted
from torchweave_ray.api.openai.schema import NOISE
from torchweave_ray.api.openai.schema_messages import MAX_TOOLS, ObjectText, json_object
from torchweave_ray.api.schema import Body, DeadlineFields, SamplingFields
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.tokenizer.grammar import json_spec


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: ObjectText
    id: str | None = None
    status: str | None = None
    namespace: None = None
    caller: None = None
    parsed_arguments: Any = None


class InputCallOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Body):
    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[Any] | None = None
    id: str | None = None
    status: str | None = None
    encrypted_content: None = None


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning


class ResponseTool(Body):
    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    type: Literal["function"]
    name: str


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    summary: None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the schema is enforced either way")

    def wanted(self) -> Wanted | None:
        if self.type == "text":
            return None
        if self.type == "json_schema" and self.schema_ is None:
            raise InvalidRequest("text.format.schema is required", "text.format.schema")
        schema = {"type": "object"} if self.type == "json_object" else self.schema_
        return Wanted(json_spec(schema), "text.format")


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: None = None


class ResponsesBody(SamplingFields, DeadlineFields):
    input: str | list[InputItem] = Field(description="a text, or the items so far")
    model: str | None = Field(None, description="the default model when it is left out")
    instructions: str | None = Field(None, description="the system message")
    max_output_tokens: int | None = Field(None, description="at least 1")
    stream: bool | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    reasoning: Reasoning | None = None
    thinking_token_budget: int | None = Field(
        None, ge=0, le=2**31 - 1, description="tokens of reasoning at most; then it is ended"
    )
    text: TextOptions | None = Field(None, description="its format")
    cache_salt: str | None = Field(None, description="share cached prefixes only with equal salts")
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="higher goes first")
    truncation: Literal["disabled"] | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "include": ([],),
        "max_tool_calls": (),
        "prompt": (),
        "top_logprobs": (0,),
    }
    reasons: ClassVar[dict[str, str]] = {
        "previous_response_id": "no response is stored; send the items of the conversation",
        "conversation": "no conversation is stored; send its items",
    }
    ignored: ClassVar[frozenset[str]] = NOISE | {"stream_options"}

    @field_validator("input", mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Clients send items back as they got them, with nulls for what they had not."""
        if not isinstance(value, list):
            return value
        return [
            {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item
            for item in value
        ]


def plain_messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """As chat templates read them: reasoning and calls belong to one assistant's message."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        match item:
            case InputMessage():
                role = "system" if item.role == "developer" else item.role
                target = _turn(messages) if role == "assistant" else None
                if target is not None and not target["content"] and "tool_calls" not in target:
                    target["content"] = _text(item.content)
                else:
                    messages.append({"role": role, "content": _text(item.content)})
            case InputReasoning():
                text = "\n".join(part.text for part in item.content or ())
                messages.append({"role": "assistant", "content": "", "reasoning_content": text})
            case InputCall():
                target = _turn(messages)
                if target is None:
                    messages.append(target := {"role": "assistant", "content": ""})
                target.setdefault("tool_calls", []).append(_call(item))
            case InputCallOutput():
                content = _text(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
    return messages


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The assistant's message that the next of its items belongs to."""
    last = messages[-1] if messages else None
    return last if last is not None and last["role"] == "assistant" else None


def _call(item: InputCall) -> dict[str, Any]:
    function = {"name": item.name, "arguments": json_object(item.arguments)}
    return {"id": item.call_id, "type": "function", "function": function}


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
