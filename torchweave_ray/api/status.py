"""Health, for load balancers and people; what the server says of its model; who sleeps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchweave_ray.api.access.caller import CALLER
from torchweave_ray.api.service import Service
from torchweave_ray.errors import RequestError

logger = logging.getLogger(__name__)

_ASLEEP_S = 0.5
CheckHealth = Callable[[], Awaitable[object]]
"""Raises a RequestError, with the reason, when no request can be answered now."""


class StatusApi:
    def __init__(self, service: Service, check_health: CheckHealth) -> None:
        self._service = service
        self._check_health = check_health

    async def health(self, request: Request) -> Response:
        """Whether a request would be answered now; load balancers go by the status alone."""
        reason = None
        try:
            async with asyncio.timeout(self._service.settings.health_timeout_s):
                await self._check_health()
                asleep = await self._asleep()
        except RequestError as error:
            reason = error.message
        except TimeoutError:
            reason = "the backend does not answer"
        except Exception:
            logger.exception("the health check failed")
            reason = "the health check failed; the server's log says why"
        if reason is not None:
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ok"} | ({"asleep": asleep} if asleep else {}))

    async def _asleep(self) -> list[str]:
        """Models of which every replica sleeps; a request wakes one. [] if one does not say so at
        once: who is not well is not asleep."""
        try:
            async with asyncio.timeout(_ASLEEP_S):
                sleeping = await self._service.backend.sleeping(None, None)
        except TimeoutError:
            return []
        return [model for model, asleep in sleeping.items() if asleep and all(asleep)]

    async def live(self, request: Request) -> Response:
        """This process runs; nothing is said of the model."""
        return JSONResponse({"status": "ok"})

    async def model(self, request: Request) -> Response:
        info = await self._service.info(request.query_params.get("model"))
        described: dict[str, Any] = {
            "model": info.id,
            "vocab_size": info.vocab_size,
            "eos": info.eos_token_ids[0] if info.eos_token_ids else None,
            "eos_token_ids": list(info.eos_token_ids),
            "device": info.device,
            "dtype": info.dtype,
            "kv_dtype": info.kv_dtype,
            "quantization": dict(info.quantization),
            "speculation": info.speculation,
            "max_batch_size": info.max_num_seqs,
            "context_length": info.max_model_len,
            "block_size": info.block_size,
            "architecture": info.architecture,
            "executor": info.executor,
            "artifact_id": info.artifact_id,
            "numerics_id": info.numerics_id,
            "asleep": info.base in await self._asleep(),
        }
        return JSONResponse(described)


class RestApi:
    """For an operator; `?model=` names a model, else all are meant."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def sleep(self, request: Request) -> Response:
        """Those that have work stay awake: the answer says how many sleep."""
        return await self._turn(request, True)

    async def wake_up(self, request: Request) -> Response:
        return await self._turn(request, False)

    async def is_sleeping(self, request: Request) -> Response:
        return await self._turn(request, None)

    async def _turn(self, request: Request, want: bool | None) -> Response:
        CALLER.get().check_operator(request.url.path)
        name = request.query_params.get("model")
        model = None if name is None else (await self._service.info(name)).base
        sleeping = await self._service.backend.sleeping(model, want)
        models = {
            name: {"replicas": len(asleep), "sleeping": sum(asleep)}
            for name, asleep in sleeping.items()
        }
        replicas = [is_asleep for asleep in sleeping.values() for is_asleep in asleep]
        is_sleeping = bool(replicas) and all(replicas)
        return JSONResponse({"is_sleeping": is_sleeping, "models": models})
