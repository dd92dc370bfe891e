"""The Starlette app over the table of every path.

Knows a `Backend` and tokenizers; whether Ray, one process or a test stands behind is theirs.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from torchweave_ray.api import playground
from torchweave_ray.api.access.access import access_of
from torchweave_ray.api.access.guard import guarding
from torchweave_ray.api.access.limits import BoundedApp
from torchweave_ray.api.access.quota import Accounts
from torchweave_ray.api.endpoint import Endpoint, RequestIds
from torchweave_ray.api.errors import on_http_exception, on_request_error
from torchweave_ray.api.observe.metrics import CountedApp
from torchweave_ray.api.reference import ReferenceApi
from torchweave_ray.api.service import LoadTokenizer, Recall, Service
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.api.status import CheckHealth
from torchweave_ray.api.table import Row, paths
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import Backend


def create_app(
    backend: Backend,
    load_tokenizer: LoadTokenizer,
    settings: ApiSettings | None = None,
    check_health: CheckHealth | None = None,
    recall: Recall | None = None,
    accounts: Accounts | None = None,
) -> Starlette:
    """`check_health`: None asks the backend for its models, which it may know from before.
    `recall` knows the streams of other processes, `accounts` what keys use there."""
    settings = settings or ApiSettings()
    access = access_of(settings, accounts)
    service = Service(backend, load_tokenizer, settings, recall, access)
    table = paths(service, check_health or service.infos)
    reference = ReferenceApi([operation for operation, _ in table])
    app = Starlette(
        routes=[
            *(_route(row, settings) for row in table),
            Route("/openapi.json", reference.document),
            Route("/docs", reference.page),
            Route("/", playground.page),
            Route("/playground/{name}", playground.asset),
        ],
        middleware=[
            Middleware(RequestIds),
            Middleware(CountedApp, metrics=service.metrics),
            Middleware(BoundedApp, settings=settings),
            *guarding(access, settings),
        ],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_exception,
        },
    )
    app.router.redirect_slashes = False
    app.state.metrics = service.metrics
    return app


def _route(row: Row, settings: ApiSettings) -> Route:
    operation, handler = row
    if operation.method == "POST" and operation.bodies:
        handler = Endpoint(operation.path, handler, settings)
    return Route(operation.path, handler, methods=[operation.method])
