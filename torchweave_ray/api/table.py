"""Every path, what /openapi.json says of it, and who answers. Knows nothing of routing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torchweave_ray.api.anthropic.messages import MessagesApi
from torchweave_ray.api.anthropic.schema import CountBody, MessagesBody
from torchweave_ray.api.endpoint import Endpoint
from torchweave_ray.api.native.generate import NativeApi
from torchweave_ray.api.native.schema import GenerateBody
from torchweave_ray.api.observe.metrics import MetricsApi
from torchweave_ray.api.openai.chat import ChatApi
from torchweave_ray.api.openai.completions import CompletionsApi
from torchweave_ray.api.openai.embeddings import EmbeddingsApi, EmbeddingsBody
from torchweave_ray.api.openai.models import ModelsApi
from torchweave_ray.api.openai.schema import ChatBody, CompletionBody
from torchweave_ray.api.openai.tokens import (
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
    TokensApi,
)
from torchweave_ray.api.reference import Operation
from torchweave_ray.api.requests import RequestsApi
from torchweave_ray.api.responses.create import ResponsesApi
from torchweave_ray.api.responses.schema import ResponsesBody
from torchweave_ray.api.service import Service
from torchweave_ray.api.status import CheckHealth, RestApi, StatusApi
from torchweave_ray.api.streams.resume import ByBody, StreamsApi

Row = tuple[Operation, Callable[..., Any]]
"""GET, DELETE and a POST without a body take Starlette's request or are ASGI, another POST takes an
endpoint's `Call`."""


def paths(service: Service, check_health: CheckHealth) -> list[Row]:
    generating = [
        (operation, ByBody(service, handler) if operation.streams else handler)
        for operation, handler in _generating(service)
    ]
    endpoints = {
        operation.path: Endpoint(operation.path, handler, service.settings)
        for operation, handler in generating
        if operation.streams
    }
    resume = Operation("GET", "/v1/streams/{stream_id}", "go on with a stream", streams=True)
    return [
        *_about(service, check_health),
        *generating,
        (resume, StreamsApi(service, endpoints)),
    ]


def _about(service: Service, check_health: CheckHealth) -> list[Row]:
    status, tokens = StatusApi(service, check_health), TokensApi(service)
    models = ModelsApi(service, created=int(time.time()))
    requests, metrics = RequestsApi(service), MetricsApi(service.backend, service.metrics)
    rest = RestApi(service)
    tokenize = (TokenizeBody, TokenizeChatBody)
    return [
        (Operation("GET", "/health", "whether a request would be answered now"), status.health),
        (Operation("GET", "/readyz", "the same"), status.health),
        (Operation("GET", "/livez", "this process runs"), status.live),
        (Operation("GET", "/metrics", "what Prometheus scrapes, of all replicas"), metrics.text),
        (Operation("GET", "/model", "the model served, and its limits"), status.model),
        (Operation("GET", "/v1/models", "the models served"), models.all),
        (Operation("GET", "/v1/models/{model_id:path}", "one of them"), models.one),
        (Operation("POST", "/sleep", "let idle replicas give their memory back"), rest.sleep),
        (Operation("POST", "/wake_up", "load what sleeps before a request comes"), rest.wake_up),
        (Operation("GET", "/is_sleeping", "whether all replicas sleep"), rest.is_sleeping),
        (Operation("DELETE", "/v1/requests/{request_id}", "stop a request"), requests.stop),
        (
            Operation("POST", "/tokenize", "token ids of a prompt or chat", tokenize),
            tokens.tokenize,
        ),
        (Operation("POST", "/detokenize", "their text", (DetokenizeBody,)), tokens.detokenize),
        (Operation("POST", "/render", "the prompt of a chat", (ChatBody,)), tokens.render),
    ]


def _generating(service: Service) -> list[Row]:
    embed = EmbeddingsApi(service).create
    native, messages = NativeApi(service), MessagesApi(service)
    count = Operation("POST", "/v1/messages/count_tokens", "of a message", (CountBody,))

    def post(path: str, body: type[Any], streams: bool = True) -> Operation:
        return Operation("POST", path, "generate", (body,), streams)

    return [
        (post("/v1/generate", GenerateBody), native.stream),
        (post("/v1/generate_nobatch", GenerateBody, False), native.unbatched),
        (post("/v1/completions", CompletionBody), CompletionsApi(service).create),
        (post("/v1/chat/completions", ChatBody), ChatApi(service).create),
        (post("/v1/responses", ResponsesBody), ResponsesApi(service).create),
        (post("/v1/messages", MessagesBody), messages.create),
        (Operation("POST", "/v1/embeddings", "vectors of texts", (EmbeddingsBody,)), embed),
        (count, messages.count_tokens),
    ]
