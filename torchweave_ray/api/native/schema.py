"""The body of /v1/generate and /v1/generate_nobatch."""

from __future__ import annotations

from pydantic import Field

from torchweave_ray.api.grammar import GrammarFields
from torchweave_ray.api.schema import DeadlineFields, SamplingFields


class GenerateBody(SamplingFields, GrammarFields, DeadlineFields):
    prompt: str | list[int] = Field(description="text, or token ids")
    model: str | None = Field(None, description="the default model when it is left out")
    max_new_tokens: int | None = Field(None, description="at least 1")
