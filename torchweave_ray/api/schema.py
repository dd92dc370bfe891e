"""What every generating endpoint accepts alike, and how a body becomes a schema or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torchweave_ray.api.endpoint import MAX_DEADLINE_MS, Call
from torchweave_ray.api.errors import invalid_body
from torchweave_ray.errors import InvalidRequest, nearest
from torchweave_ray.sampling_params import MAX_BAD_WORDS
from torchweave_ray.tokenizer import Tokenizer

MAX_CHOICES = 128
"""Prompts times `n` of one call."""


class Body(BaseModel):
    """A request body: exact types, and no field that is not listed."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of the protocol that we do not have; values that ask for nothing are accepted."""
    reasons: ClassVar[Mapping[str, str]] = {}
    """Why, for some of the unsupported."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that clients send and that cannot change an answer; X-Ignored-Params lists them."""


class DeadlineFields(Body):
    """What every call that keeps an engine busy accepts."""

    deadline_ms: int | None = Field(
        None, ge=1, le=MAX_DEADLINE_MS, description="the whole answer within so many milliseconds"
    )


class SamplingFields(Body):
    """`SamplingParams` under vLLM's names; a null is as good as nothing."""

    temperature: float | None = Field(None, description="0 is greedy")
    top_k: int | None = Field(None, le=2**31 - 1, description="0 keeps all tokens")
    top_p: float | None = Field(None, description="above 0, at most 1")
    min_p: float | None = Field(None, description="0 to 1, of the likeliest token's probability")
    repetition_penalty: float | None = Field(None, description="above 0; 1 changes nothing")
    presence_penalty: float | None = Field(None, description="-2 to 2")
    frequency_penalty: float | None = Field(None, description="-2 to 2")
    logit_bias: dict[str, float] | None = Field(None, description="token id to -100..100")
    allowed_token_ids: list[int] | None = Field(None, description="only these are drawn")
    bad_words: list[str] | None = Field(None, description="up to 128; never written")
    seed: int | None = Field(None, description="choice i of n draws with seed + i")
    min_tokens: int | None = Field(None, description="no end before so many tokens")
    ignore_eos: bool | None = Field(None, description="go on after end-of-sequence")
    stop: str | list[str] | None = Field(None, description="up to 16 strings")
    stop_token_ids: list[int] | None = Field(None, description="token ids that end the text")
    include_stop_str_in_output: bool | None = Field(None, description="keep the stop string")
    skip_special_tokens: bool | None = Field(None, description="leave them out of the text")

    def sampling_fields(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the client set, as keyword arguments of `SamplingParams`."""
        values = {name: getattr(self, name) for name in SamplingFields.model_fields}
        values = {name: value for name, value in values.items() if value is not None}
        if "stop" in values:
            stop = values["stop"]
            values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        for name in ("stop_token_ids", "allowed_token_ids"):
            if name in values:
                values[name] = tuple(values[name])
        if "bad_words" in values:
            values["bad_words"] = _bad_words(values["bad_words"], tokenizer)
        if "logit_bias" in values:
            values["logit_bias"] = _token_biases(values["logit_bias"])
        return values


B = TypeVar("B", bound=Body)


def parse(schema: type[B], call: Call) -> B:
    """Raises InvalidRequest naming the first field that is wrong, unknown or not built.

    A deadline in the body holds from here on.
    """
    known = {}
    for name, value in call.body.items():
        if name in schema.model_fields:
            known[name] = value
        elif name in schema.ignored:
            call.ignored.append(name)
        elif name in schema.unsupported:
            if value is not None and value not in schema.unsupported[name]:
                why = f": {schema.reasons[name]}" if name in schema.reasons else ""
                message = f"{name} is not supported{why}"
                raise InvalidRequest(message, name, "unsupported_parameter")
        else:
            hint = nearest(name, schema.model_fields)
            raise InvalidRequest(f"unknown field {name!r}{hint}", name, "unknown_parameter")
    try:
        body = schema.model_validate(known)
    except ValidationError as error:
        raise invalid_body(error) from None
    if isinstance(body, DeadlineFields) and body.deadline_ms is not None:
        call.limit(body.deadline_ms)
    return body


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the start of a text and behind a space."""
    if not all(word.strip() for word in words):
        raise InvalidRequest("a bad word must not be empty", "bad_words")
    if len(words) > MAX_BAD_WORDS // 2:
        raise InvalidRequest(f"at most {MAX_BAD_WORDS // 2} bad words", "bad_words")
    forms = (form for word in words for form in (word, f" {word.lstrip()}"))
    return tuple(dict.fromkeys(tuple(tokenizer.encode(form, False)) for form in forms))


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for key, bias in biases.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise InvalidRequest(f"logit_bias: {key!r} is not a token id", "logit_bias")
        found[int(key)] = bias
    return found
