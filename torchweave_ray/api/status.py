"""Health for load balancers and people, and what the server says of its model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchweave_ray.api.service import Service
from torchweave_ray.errors import RequestError

logger = logging.getLogger(__name__)

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
        except RequestError as error:
            reason = error.message
        except TimeoutError:
            reason = "the backend does not answer"
        except Exception:
            logger.exception("the health check failed")
            reason = "the health check failed; the server's log says why"
        if reason is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)

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
            "max_batch_size": info.max_num_seqs,
            "context_length": info.max_model_len,
            "block_size": info.block_size,
            "architecture": info.architecture,
            "executor": info.executor,
            "artifact_id": info.artifact_id,
            "numerics_id": info.numerics_id,
        }
        return JSONResponse(described)
