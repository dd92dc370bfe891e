"""Bodies of the OpenAI endpoints: what we build, what is refused by name, what is noise."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from torchweave_ray.api.grammar import GrammarFields
from torchweave_ray.api.schema import MAX_CHOICES, Body, SamplingFields

_NOISE = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
    }
)
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "prompt_logprobs": (),
    "priority": (0,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "return_token_ids": (False,),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class OpenAIBody(SamplingFields, GrammarFields):
    model: str | None = Field(None, description="the default model when it is left out")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices of each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="at least 1")
    cache_salt: str | None = Field(None, description="share cached prefixes only with equal salts")

    ignored: ClassVar[frozenset[str]] = _NOISE


class CompletionBody(OpenAIBody):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="one or several prompts, as text or token ids"
    )
    logprobs: int | None = Field(None, description="so many likeliest tokens beside the chosen")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {**_NOT_BUILT, "suffix": ("",)}

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        """One plain complaint instead of one for each form."""
        items = value if isinstance(value, list) else [value]
        if (
            all(isinstance(item, str) for item in items)
            or all(type(item) is int for item in items)
            or all(isinstance(item, list) and _are_ids(item) for item in items)
        ) and type(value) is not int:
            return value
        raise ValueError("must be a string, a list of strings, token ids, or a list of token ids")


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = None

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

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: plain text, and "system" for its newer name."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


class ChatBody(OpenAIBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, description="needs logprobs")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="variables of the chat template"
    )
    continue_final_message: bool | None = Field(
        None, description="the answer goes on where the last message ends"
    )

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NOT_BUILT,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }
    ignored: ClassVar[frozenset[str]] = _NOISE | {"parallel_tool_calls"}

    @field_validator("messages", mode="before")
    @classmethod
    def _drop_empty_fields(cls, value: Any) -> Any:
        """Clients send an answer back as they got it, with nulls for what it had not."""
        if not isinstance(value, list):
            return value
        return [_without_nulls(m) if isinstance(m, dict) else m for m in value]


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {"annotations": [], "tool_calls": []}
    return {k: v for k, v in message.items() if v is not None and v != empty.get(k, ...)}


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)
