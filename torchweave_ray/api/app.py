"""The Starlette app: every path in one table.

Knows a `Backend` and tokenizers; whether Ray, one process or a test stands behind is theirs.
"""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from torchweave_ray.api.endpoint import Endpoint, Handler, RequestIds
from torchweave_ray.api.errors import on_http_exception, on_request_error
from torchweave_ray.api.native.generate import NativeApi
from torchweave_ray.api.openai.chat import ChatApi
from torchweave_ray.api.openai.completions import CompletionsApi
from torchweave_ray.api.openai.models import ModelsApi
from torchweave_ray.api.service import LoadTokenizer, Service
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.api.status import CheckHealth, StatusApi
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import Backend


def create_app(
    backend: Backend,
    load_tokenizer: LoadTokenizer,
    settings: ApiSettings | None = None,
    check_health: CheckHealth | None = None,
) -> Starlette:
    """`check_health`: None asks the backend for its models, which it may know from before."""
    settings = settings or ApiSettings()
    service = Service(backend, load_tokenizer, settings)
    native, status = NativeApi(service), StatusApi(service, check_health or service.infos)
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
