"""/v1/embeddings: hidden states of a text, pooled and normalised."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.generation import Progress, generate
from torchweave_ray.api.openai.schema import check_texts
from torchweave_ray.api.schema import DeadlineFields, parse
from torchweave_ray.api.service import Model, Service
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import GenerateRequest, OutputKind, Pooling

MAX_INPUTS = 2048


class EmbeddingsBody(DeadlineFields):
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="one or several texts, as text or token ids"
    )
    model: str | None = Field(None, description="the default model when it is left out")
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["last", "mean"] | None = Field(
        None, description="of the last token, or the mean of all; last"
    )
    normalize: bool | None = Field(None, description="to length 1; true")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"dimensions": ()}
    reasons: ClassVar[dict[str, str]] = {"dimensions": "a vector has the model's hidden size"}
    ignored: ClassVar[frozenset[str]] = frozenset({"user"})

    _check_input = field_validator("input", mode="before")(check_texts)


class EmbeddingsApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> ASGIApp:
        body = parse(EmbeddingsBody, call)
        model = await self._service.model(body.model)
        requests = await self._requests(call, body, model)
        progress = Progress(call, model.info.id)
        vectors: list[Sequence[float] | None] = [None] * len(requests)
        async for index, output in generate(call, self._service, requests):
            progress.note(output)
            if output.pooled is not None:
                vectors[index] = output.pooled
        if progress.failure is not None:
            raise progress.failure
        data = [
            {"object": "embedding", "index": index, "embedding": _shown(body, vector or ())}
            for index, vector in enumerate(vectors)
        ]
        num = progress.usage.prompt_tokens
        answer = {
            "object": "list",
            "data": data,
            "model": model.info.id,
            "usage": {"prompt_tokens": num, "total_tokens": num},
            "timings": progress.timings_json(),
        }
        return JSONResponse(answer, headers=call.headers)

    async def _requests(
        self, call: Call, body: EmbeddingsBody, model: Model
    ) -> list[GenerateRequest]:
        given: Any = body.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or not all(given):
            raise InvalidRequest("input must not be empty", "input")
        if len(given) > MAX_INPUTS:
            raise InvalidRequest(f"at most {MAX_INPUTS} inputs", "input")
        ids = [
            await self._service.encode(model, text, "input")
            if isinstance(text, str)
            else tuple(text)
            for text in given
        ]
        sampling = self._service.sampling(call.id, {}, None)
        requests = self._service.requests(
            model,
            f"embd-{call.id}",
            ids,
            sampling,
            prompt_param="input",
            max_choices=MAX_INPUTS,
        )
        pooling = Pooling(body.pooling or "last")
        return [replace(r, output_kind=OutputKind.POOLED, pooling=pooling) for r in requests]


def _shown(body: EmbeddingsBody, vector: Sequence[float]) -> list[float] | str:
    if body.normalize is not False:
        length = math.sqrt(math.fsum(value * value for value in vector)) or 1.0
        vector = [value / length for value in vector]
    if body.encoding_format == "base64":
        return base64.b64encode(array("f", vector).tobytes()).decode()
    return list(vector)
