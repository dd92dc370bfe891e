"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchweave_ray.api.service import Service
from torchweave_ray.outputs import ModelInfo


class ModelsApi:
    def __init__(self, service: Service, created: int) -> None:
        """`created`: Unix seconds; OpenAI's clients want some."""
        self._service = service
        self._created = created

    async def all(self, request: Request) -> Response:
        infos = await self._service.infos()
        return JSONResponse({"object": "list", "data": [self._describe(i) for i in infos]})

    async def one(self, request: Request) -> Response:
        return JSONResponse(
            self._describe(await self._service.info(request.path_params["model_id"]))
        )

    def _describe(self, info: ModelInfo) -> dict[str, Any]:
        return {
            "id": info.id,
            "object": "model",
            "created": self._created,
            "owned_by": "torchweave",
            "max_model_len": info.max_model_len,
            "artifact_id": info.artifact_id,
            "parent": info.base if info.adapter else None,
        }
