"""The Starlette app: every path in one table, health, and what the server says of its model.

Knows a `Backend` and tokenizers; whether Ray, one process or a test stands behind is theirs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from torchweave_ray.api.endpoint import Endpoint, Handler, RequestIds
from torchweave_ray.api.errors import on_http_exception, on_request_error
from torchweave_ray.api.native.generate import NativeApi
from torchweave_ray.api.openai.chat import ChatApi
from torchweave_ray.api.openai.completions import CompletionsApi
from torchweave_ray.api.openai.models import ModelsApi
from torchweave_ray.api.service import LoadTokenizer, Service
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import Backend

logger = logging.getLogger(__name__)

CheckHealth = Callable[[], Awaitable[object]]
"""Raises a RequestError, with the reason, when no request can be answered now."""


def create_app(
    backend: Backend,
    load_tokenizer: LoadTokenizer,
    settings: ApiSettings | None = None,
    check_health: CheckHealth | None = None,
) -> Starlette:
    """`check_health`: None asks the backend for its models, which it may know from before."""
    settings = settings or ApiSettings()
    service = Service(backend, load_tokenizer, settings)
    native, status = NativeApi(service), _Status(service, check_health or service.infos)
    completions, chat = CompletionsApi(service), ChatApi(service)
    models = ModelsApi(service, created=int(time.time()))

    def post(path: str, handler: Handler) -> Route:
        return Route(path, Endpoint(handler, settings.max_body_bytes), methods=["POST"])

    app = Starlette(
        routes=[
            Route("/health", status.health),
            Route("/readyz", status.health),
            Route("/livez", status.live),
            Route("/model", status.model),
            Route("/v1/models", models.all),
            Route("/v1/models/{model_id:path}", models.one),
            post("/v1/generate", native.stream),
            post("/v1/generate_nobatch", native.unbatched),
            post("/v1/completions", completions.create),
            post("/v1/chat/completions", chat.create),
        ],
        middleware=[Middleware(RequestIds)],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_exception,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Status:
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
            "max_batch_size": info.max_num_seqs,
            "context_length": info.max_model_len,
            "block_size": info.block_size,
            "architecture": info.architecture,
            "executor": info.executor,
            "artifact_id": info.artifact_id,
            "numerics_id": info.numerics_id,
        }
        return JSONResponse(described)
