"""Bodies of the Anthropic endpoints, and the conversation that they stand for."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from torchweave_ray.api.schema import Body, DeadlineFields

_CACHE: Any = Field(None, description="accepted: prefixes are cached anyway")


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = _CACHE
    citations: None = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = _CACHE
    caller: dict[str, Any] | None = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = _CACHE


ContentBlock = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class InputMessage(Body):
    role: Literal["user", "assistant"]
    content: str | list[ContentBlock]


class InputTool(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = _CACHE


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(
        None, ge=0, le=2**31 - 1, description="then the thinking is ended"
    )


class CountBody(Body):
    model: str | None = Field(None, description="the default model when it is left out")
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[InputTool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="for templates with enable_thinking")

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "service_tier", "cache_control", "container", "inference_geo"}
    )


class MessagesBody(CountBody, DeadlineFields):
    max_tokens: int = Field(description="most tokens to generate")
    stop_sequences: list[str] | None = Field(None, description="up to 16")
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = Field(None, le=2**31 - 1)
    top_p: float | None = None


def plain_messages(body: CountBody) -> list[dict[str, Any]]:
    """As chat templates read them."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        else:
            messages += _of_blocks(message.role, message.content)
    return messages


def _of_blocks(role: str, blocks: list[ContentBlock]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says to them."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    own: dict[str, Any] = {"role": role}
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                own["reasoning_content"] = block.thinking
            case ToolUseBlock():
                function = {"name": block.name, "arguments": block.input}
                call = {"id": block.id, "type": "function", "function": function}
                own.setdefault("tool_calls", []).append(call)
            case ToolResultBlock():
                content = _text(block.content or "")
                if block.is_error:
                    content = json.dumps({"error": content}, ensure_ascii=False)
                results.append(
                    {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
                )
    own["content"] = "\n".join(texts)
    return [*results, own] if texts or len(own) > 2 or not results else results


def _text(content: str | list[TextBlock]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.text for block in content)
