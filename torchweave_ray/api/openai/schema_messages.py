"""Messages and tools of a chat, as OpenAI has them, and as chat templates read them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from torchweave_ray.api.schema import Body

MAX_TOOLS = 128


def json_object(text: str) -> dict[str, Any]:
    """Raises ValueError, as validators want it."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("must be the JSON text of an object")
    return value


def _check_object(text: str) -> str:
    json_object(text)
    return text


ObjectText = Annotated[str, AfterValidator(_check_object)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: ObjectText = Field(description="the JSON text of an object")


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments themselves, so they get the object."""
        arguments = json_object(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = Field(description="text, or parts of text")
    name: str | None = None
    reasoning_content: str | None = Field(None, description="an assistant's, as it was answered")
    tool_calls: list[ToolCall] | None = Field(None, description="an assistant's")
    tool_call_id: str | None = Field(None, description="which call a tool message answers")

    @model_validator(mode="before")
    @classmethod
    def _fill_content(cls, value: Any) -> Any:
        """A message that is nothing but calls needs no content."""
        if isinstance(value, dict) and value.get("tool_calls"):
            return {"content": "", **value}
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError("must be a string or a list of text parts")
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text":
                raise ValueError(f"only text parts are supported, got {kind!r}")
        return value

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a tool message, and no other, has a tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: plain text, and "system" for its newer name."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        for name in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of an object")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function = self.function
        described: dict[str, Any] = {"name": function.name}
        if function.description is not None:
            described["description"] = function.description
        described["parameters"] = function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": described}


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Clients send an answer back as they got it, with nulls for what it had not."""
    empty: dict[str, Any] = {"annotations": [], "tool_calls": []}
    return {k: v for k, v in message.items() if v is not None and v != empty.get(k, ...)}
