"""Bodies of the OpenAI endpoints: what we build, what is refused by name, what is noise."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from torchweave_ray.api.grammar import GrammarFields
from torchweave_ray.api.openai.schema_messages import (
    MAX_TOOLS,
    Message,
    Tool,
    ToolChoice,
    without_nulls,
)
from torchweave_ray.api.schema import MAX_CHOICES, Body, DeadlineFields, SamplingFields

NOISE = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
}


def check_texts(value: Any) -> Any:
    """One plain complaint instead of one for each form."""
    items = value if isinstance(value, list) else [value]
    if (
        all(isinstance(item, str) for item in items)
        or all(type(item) is int for item in items)
        or all(isinstance(item, list) and _are_ids(item) for item in items)
    ) and type(value) is not int:
        return value
    raise ValueError("must be a string, a list of strings, token ids, or a list of token id lists")


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    continuous_usage_stats: bool | None = Field(
        None, description="the usage so far in every chunk; needs include_usage"
    )
    include_obfuscation: Literal[False] | None = None


class OpenAIBody(SamplingFields, GrammarFields, DeadlineFields):
    model: str | None = Field(None, description="the default model when it is left out")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices of each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="at least 1")
    prompt_logprobs: int | None = Field(
        None, description="so many likeliest tokens at each place of the prompt, 0 to 20"
    )
    return_token_ids: bool | None = Field(None, description="ids of prompt and answer")
    stream_interval: int | None = Field(
        None, ge=1, le=1024, description="tokens in a chunk at least, after the first one"
    )
    priority: int | None = Field(
        None, ge=-(2**31), le=2**31 - 1, description="higher goes first; 0 when left out"
    )
    cache_salt: str | None = Field(None, description="share cached prefixes only with equal salts")

    ignored: ClassVar[frozenset[str]] = NOISE | {"prediction"}


class CompletionBody(OpenAIBody):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="one or several prompts, as text or token ids"
    )
    logprobs: int | None = Field(
        None, description="so many likeliest tokens beside the chosen, 0 to 20"
    )
    echo: bool | None = Field(None, description="the prompt in front of the answer")
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="draw so many, answer with the n likeliest"
    )

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NOT_BUILT,
        "suffix": ("",),
        "thinking_token_budget": (),
    }
    reasons: ClassVar[dict[str, str]] = {
        "thinking_token_budget": "a plain prompt has no template that marks reasoning",
        "suffix": "the models served here are not trained to fill in the middle",
    }

    _check_prompt = field_validator("prompt", mode="before")(check_texts)


class ConversationBody(Body):
    """What makes a chat's prompt; /render and /tokenize take it too."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="functions")
    tool_choice: ToolChoice | None = Field(
        None, description='"none", "auto", "required", or one function by name'
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = Field(
        None, description="for templates that have such a setting"
    )
    thinking_token_budget: int | None = Field(
        None, ge=0, le=2**31 - 1, description="tokens of reasoning at most; then it is ended"
    )
    include_reasoning: bool | None = Field(None, description="false: it is left out")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="variables of the chat template"
    )
    continue_final_message: bool | None = Field(
        None, description="the answer goes on where the last message ends"
    )

    @field_validator("messages", mode="before")
    @classmethod
    def _drop_empty_fields(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [without_nulls(m) if isinstance(m, dict) else m for m in value]


class ChatBody(OpenAIBody, ConversationBody):
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, description="0 to 20; needs logprobs")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NOT_BUILT,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "verbosity": (),
        "web_search_options": (),
    }
    ignored: ClassVar[frozenset[str]] = NOISE | {"prediction"}


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)
