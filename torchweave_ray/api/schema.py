"""What every generating endpoint accepts alike, and how a body becomes a schema or an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import invalid_body
from torchweave_ray.errors import InvalidRequest, nearest

MAX_CHOICES = 128
"""Prompts times `n` of one call."""


class Body(BaseModel):
    """A request body: exact types, and no field that is not listed."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of the protocol that we do not have; values that ask for nothing are accepted."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that clients send and that cannot change an answer; X-Ignored-Params lists them."""


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
    seed: int | None = Field(None, description="choice i of n draws with seed + i")
    min_tokens: int | None = Field(None, description="no end before so many tokens")
    ignore_eos: bool | None = Field(None, description="go on after end-of-sequence")
    stop: str | list[str] | None = Field(None, description="up to 16 strings")
    stop_token_ids: list[int] | None = Field(None, description="token ids that end the text")
    include_stop_str_in_output: bool | None = Field(None, description="keep the stop string")
    skip_special_tokens: bool | None = Field(None, description="leave them out of the text")

    def sampling_fields(self) -> dict[str, Any]:
        """What the client set, as keyword arguments of `SamplingParams`."""
        values = {name: getattr(self, name) for name in SamplingFields.model_fields}
        values = {name: value for name, value in values.items() if value is not None}
        if "stop" in values:
            stop = values["stop"]
            values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if "stop_token_ids" in values:
            values["stop_token_ids"] = tuple(values["stop_token_ids"])
        if "logit_bias" in values:
            values["logit_bias"] = _token_biases(values["logit_bias"])
        return values


B = TypeVar("B", bound=Body)


def parse(schema: type[B], call: Call) -> B:
    """Raises InvalidRequest naming the first field that is wrong, unknown or not built."""
    known = {}
    for name, value in call.body.items():
        if name in schema.model_fields:
            known[name] = value
        elif name in schema.ignored:
            call.ignored.append(name)
        elif name in schema.unsupported:
            if value is not None and value not in schema.unsupported[name]:
                raise InvalidRequest(f"{name} is not supported", name, "unsupported_parameter")
        else:
            hint = nearest(name, schema.model_fields)
            raise InvalidRequest(f"unknown field {name!r}{hint}", name, "unknown_parameter")
    try:
        return schema.model_validate(known)
    except ValidationError as error:
        raise invalid_body(error) from None


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for key, bias in biases.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise InvalidRequest(f"logit_bias: {key!r} is not a token id", "logit_bias")
        found[int(key)] = bias
    return found
