"""`Ingress`: the HTTP API over the replicas, and the Python API of `serve.get_app_handle`.

Never loads torch: it tokenises, renders and validates with what the replicas describe. Its
constructor waits for no model, so that health can say why none answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.access.accounts import accounts_of
from deployments.access.exposure import warn_if_open
from deployments.backend.attempts import ModelClient
from deployments.backend.ray_backend import RayBackend
from deployments.bus.listener import BusListener
from deployments.drain.gate import Gate, GatedApp
from deployments.log import log_through_serve
from deployments.observe.metrics import mirrored
from torchweave_ray.api.app import create_app
from torchweave_ray.api.endpoint import check_session_id
from torchweave_ray.api.grammar import wanted_of
from torchweave_ray.api.service import Service
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.deadline import Deadline
from torchweave_ray.errors import InvalidRequest, TorchWeaveError, nearest
from torchweave_ray.outputs import RequestOutput, merge_outputs
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CHUNK_INTERVAL_S = 0.0015
"""What a chunk costs without HAProxy: its Python proxy takes most of a millisecond for each."""


@dataclass(frozen=True, slots=True)
class IngressConfig:
    api: ApiSettings
    bus: bool
    longest_stream_s: float
    """How long Serve lets a replica that it stops finish its streams."""
    sleepers: tuple[str, ...] = ()
    """Models that autoscaling may leave without a replica."""
    num_ingresses: int = 1


@serve.ingress()
class Ingress:
    async def __init__(  # type: ignore[misc]  # Serve awaits it, inside its loop
        self,
        config: IngressConfig,
        models: Mapping[str, DeploymentHandle[Any]],
        ledger: DeploymentHandle[Any] | None = None,
    ) -> None:
        """`ledger`: of the limits of keys, where several ingresses share them."""
        log_through_serve()
        bus = BusListener() if config.bus else None
        if bus is not None:
            await bus.start(_host())
        has_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
        self._backend = RayBackend(
            {
                model: ModelClient(handle, config.longest_stream_s, model in config.sleepers)
                for model, handle in models.items()
            },
            bus,
            chunk_interval_s=0.0 if has_haproxy else CHUNK_INTERVAL_S,
        )
        self._tokenizers: dict[str, tuple[dict[str, bytes], asyncio.Task[Tokenizer]]] = {}
        self._service = Service(self._backend, self._load_tokenizer, config.api)
        self._gate = Gate()
        self._app = create_app(
            self._backend,
            self._load_tokenizer,
            config.api,
            self._check_health,
            self._backend.recall,
            None if ledger is None else accounts_of(ledger, config.num_ingresses),
        )
        self._app.user_middleware.insert(0, Middleware(SaidByServe))  # the outermost
        self._app.user_middleware.append(Middleware(GatedApp, gate=self._gate))  # the innermost
        self._watch = asyncio.create_task(self._backend.watch())
        counted = (self._app.state.metrics, self._backend.moves)
        self._mirrors = [mirrored(each, {}) for each in counted]
        self._warmups = [asyncio.create_task(self._warm(model)) for model in models]
        if config.api.keys_file is None:
            self._warmups.append(asyncio.create_task(warn_if_open()))

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app

    async def drain(self) -> int:
        """Refuse what comes from now on; returns how many requests are still open."""
        if not self._gate.is_closed:
            self._gate.is_closed = True
            logger.info("[Drain] %d requests are open", self._gate.num_open)
        return self._gate.num_open

    async def _check_health(self) -> None:
        self._gate.check()
        await self._backend.check_health()

    async def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str | None = None,
        n: int = 1,
        cache_salt: str = "",
        session_id: str = "",
        structured_outputs: Mapping[str, Any] | None = None,
        deadline_ms: int | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """For Python: `serve.get_app_handle("torchweave").options(stream=True).generate.remote(
        "What is gravity?", max_tokens=32)` yields outputs until one `is_last`.

        `structured_outputs` and `deadline_ms` are those of HTTP, `sampling` are SamplingParams'
        fields. Raises RequestError; cancel the response to leave early.
        """
        deadline = _deadline(deadline_ms)
        served = await self._service.model(model)
        if (prompt is None) == (messages is None):
            raise InvalidRequest("give either a prompt or messages", "prompt")
        if messages is not None:
            chat = served.tokenizer.render_chat(messages)
            ids = await self._service.encode(served, chat, "messages", add_special_tokens=False)
        elif isinstance(prompt, str):
            ids = await self._service.encode(served, prompt, "prompt")
        else:
            ids = tuple(prompt or ())
        call_id = f"py-{uuid.uuid4().hex}"
        params = self._service.sampling(call_id, *_split(sampling))
        (request,) = self._service.requests(
            served, call_id, [ids], params, n=n, cache_salt=cache_salt
        )
        if structured_outputs is not None:
            wanted = wanted_of({"structured_outputs": structured_outputs})
            (request,) = await self._service.constrain(served, wanted, [request])
        check_session_id(session_id, "session_id")
        request = replace(request, session_id=session_id, deadline=deadline)
        with self._gate.passing():
            async with aclosing(self._backend.generate(request)) as outputs:
                async for output in outputs:
                    yield output

    async def complete(
        self, prompt: str | Sequence[int] | None = None, **options: Any
    ) -> RequestOutput:
        """`generate` without streaming: all outputs as one, with a delta for each choice."""
        async with aclosing(self.generate(prompt, **options)) as outputs:
            return merge_outputs([output async for output in outputs])

    async def _load_tokenizer(self, model: str) -> Tokenizer:
        """One for HTTP and Python; read again only when reading it failed."""
        files = (await self._backend.describe(model)).files
        read_from, task = self._tokenizers.get(model, ({}, None))
        failed = task is not None and task.done() and (task.cancelled() or task.exception())
        if task is None or failed or read_from != files:  # an update may have replaced the model
            task = asyncio.create_task(asyncio.to_thread(Tokenizer.from_files, files))
            self._tokenizers[model] = (files, task)
        return await asyncio.shield(task)

    async def _warm(self, model: str) -> None:
        """Have tokenizer and template ready before the first request, whenever the model is."""
        while True:
            try:
                tokenizer = await self._load_tokenizer(model)
            except TorchWeaveError as error:
                logger.info("[Start] %s: %s", model, error)
                await asyncio.sleep(1.0)
            else:
                return await asyncio.to_thread(tokenizer.warm)


class SaidByServe:
    """Middleware, the outermost: an answer has one x-request-id. Serve gives every request one, or
    keeps the client's, and repeats it behind ours; only an id that differs, in place of one that we
    would not log, is left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("x-request-id")

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if said is not None and headers.get("x-request-id") == said:
                    del headers["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without)


def _deadline(milliseconds: int | None) -> Deadline | None:
    """Counted from the call's arrival here."""
    if milliseconds is None:
        return None
    if type(milliseconds) is not int or milliseconds < 1:
        raise InvalidRequest("deadline_ms must be a whole number of at least 1", "deadline_ms")
    return Deadline.after(milliseconds / 1e3)


def _split(sampling: dict[str, Any]) -> tuple[dict[str, Any], int | None, int | None]:
    """(other fields, max_tokens, logprobs); raises InvalidRequest naming an unknown field."""
    known = {field.name for field in fields(SamplingParams)}
    for name in sampling:
        if name not in known:
            raise InvalidRequest(f"unknown field {name!r}{nearest(name, known)}", name)
    rest = dict(sampling)
    return rest, rest.pop("max_tokens", None), rest.pop("logprobs", None)


def _host() -> str:
    """This node's address for the replicas; without a cluster they are in this process."""
    return ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
