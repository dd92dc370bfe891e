"""`RayBackend`: answers requests through Serve handles.

A stream whose replica or bus is lost goes on elsewhere, from what its client has. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import fields, replace

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.backend.adapters import ADAPTER, Adapters
from deployments.backend.attempts import (
    Lost,
    ModelClient,
    NoRoom,
    choices_over_handle,
    over_bus,
    over_handle,
)
from deployments.backend.descriptions import Descriptions
from deployments.backend.hints import avoiding, with_hint
from deployments.backend.progress import Progress
from deployments.bus.listener import BusListener
from deployments.calls import Alive, Description, EngineFailed
from deployments.observe.metrics import reports_of
from deployments.status import is_asleep, why_down
from torchweave_ray.errors import InvalidRequest, RequestError, Unavailable, model_not_found
from torchweave_ray.metrics import Moves
from torchweave_ray.outputs import GenerateRequest, ModelInfo, OutputKind, RequestOutput, Stats
from torchweave_ray.reported import Reported

logger = logging.getLogger(__name__)

MAX_RESUMES = 5
RESUME_WAIT_S = 0.2
"""Before the first resume; doubles with each, up to 2 s: a dead engine is replaced in seconds."""
DESCRIBE_TIMEOUT_S = 30.0
"""Longest wait of a request for a model whose first replica is still starting."""
PING_TIMEOUT_S = 2.0
MAX_CHUNK_INTERVAL_S = 0.05
WATCH_S = 1.0
ARTIFACT = "artifact_id"
"""What a replica of another artifact refuses a request for."""


class RayBackend:
    def __init__(
        self,
        clients: Mapping[str, ModelClient],
        bus: BusListener | None,
        chunk_interval_s: float = 0.0,
        resume_wait_s: float = RESUME_WAIT_S,
    ) -> None:
        """`chunk_interval_s`, times the streams that are open, is the least time between two
        chunks of one: it merges tokens where every chunk costs the proxy dearly."""
        self.clients = clients
        self._bus = bus
        self._chunk_interval_s = chunk_interval_s
        self._resume_wait_s = resume_wait_s
        self._num_open = 0
        self.moves = Moves()
        self._descriptions = Descriptions(clients)
        self._adapters = Adapters(clients)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestOutput]:
        """Outputs until one `is_last`; raises RequestError when refused or lost for good."""
        client = self._client(request.base_model)
        request = with_hint(request, self._descriptions.known(request.base_model))
        if doubtful := self._doubtful(client):
            request = avoiding(request, *doubtful)
        progress = Progress(request)
        self._num_open += 1
        try:
            try:
                async with aclosing(self._of_any_artifact(client, request, progress)) as outputs:
                    async for output in outputs:
                        progress.note(output)
                        yield output
                return
            except Lost as error:
                logger.warning("[Request] %s goes on elsewhere: %s", request.request_id, error)
                replica = error.replica
                client.fleet.suspect(replica)
                self.moves.note("resumed")
            async with aclosing(self._resume(client, request, progress, replica)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._num_open -= 1

    async def _of_any_artifact(
        self, client: ModelClient, request: GenerateRequest, progress: Progress
    ) -> AsyncGenerator[RequestOutput]:
        """The first attempt; while an update rolls, replicas of two artifacts may answer it, or of
        two adapters of one name."""
        try:
            async with aclosing(self._first_attempt(client, request, progress)) as outputs:
                async for output in outputs:
                    yield output
            return
        except InvalidRequest as error:
            if error.param == ARTIFACT:
                await self._descriptions.forget(request.base_model)
                request = replace(request, artifact_id="")
            else:
                renewed = await self._adapters.renewed(request, error)
                request = replace(request, adapter_id=renewed)
                progress.renew(request)
        async with aclosing(self._first_attempt(client, request, progress)) as outputs:
            async for output in outputs:
                yield output

    async def models(self) -> list[ModelInfo]:
        """Models that a replica serves; Unavailable, with the reason, when there is none yet."""
        infos = await self._descriptions.all(DESCRIBE_TIMEOUT_S)
        return await self._adapters.listed(infos)

    async def info(self, model: str) -> ModelInfo:
        base = model if model in self.clients else model.rpartition(":")[0]
        if base not in self.clients:
            raise model_not_found(model, self.clients)
        info = (await self.describe(base)).info
        return info if base == model else await self._adapters.info(info, model)

    async def describe(self, model: str, timeout_s: float = DESCRIBE_TIMEOUT_S) -> Description:
        """Asked of a replica once and kept until one refuses a request for its artifact."""
        self._client(model)  # or there is no such model
        return await self._descriptions.ask(model, timeout_s)

    async def watch(self) -> None:
        """For ever: moves the streams that would outlive replicas which Serve stops."""
        while True:
            await asyncio.sleep(WATCH_S)
            for client in self.clients.values():
                if client.fleet.look():
                    answers = await client.ask_all("alive")
                    client.fleet.note([each for each in answers if isinstance(each, Alive)])
                    if self._bus is not None:
                        self._bus.move(client.fleet.must_move)

    async def stop(self, call_id: str) -> bool:
        """Every replica is asked: only they know the requests of all ingresses."""
        asked = (client.ask_all("stop", call_id) for client in self.clients.values())
        return any(True in answers for answers in await asyncio.gather(*asked))

    async def recall(self, call_id: str) -> list[GenerateRequest]:
        """Requests of a call whose stream is to go on, asked of every replica; Unavailable when
        none has them and one did not answer, or a new handle knows none yet."""
        asked = (client.ask_all("recall", call_id) for client in self.clients.values())
        lists = [each for of_model in await asyncio.gather(*asked) for each in of_model or [None]]
        found = [request for each in lists if isinstance(each, list) for request in each]
        if not found and not all(isinstance(each, list) for each in lists):
            raise Unavailable("a replica has not said whether it knows this", None, None, 1.0)
        return found

    async def check_health(self) -> None:
        """Raises Unavailable, with the reason, when no replica of any model answers now."""
        pings = [self._ping(model, client) for model, client in self.clients.items()]
        reasons = await asyncio.gather(*pings)
        if all(reasons):
            raise Unavailable("; ".join(filter(None, reasons)), None, None, 5.0)

    async def sleeping(self, model: str | None, want: bool | None) -> dict[str, list[bool]]:
        """See `Backend`; of the replicas that answer."""
        clients = self.clients if model is None else {model: self._client(model)}
        asked = (client.ask_all("sleeping", want) for client in clients.values())
        answers = zip(clients, await asyncio.gather(*asked), strict=True)
        return {name: [each for each in of if isinstance(each, bool)] for name, of in answers}

    async def stats(self) -> dict[str, Stats]:
        """By model, summed over the replicas that answer."""
        sums: dict[str, Stats] = {}
        for model, client in self.clients.items():
            answers = await client.ask_all("stats")
            sums[model] = _sum([each for each in answers if isinstance(each, Stats)])
        return sums

    async def metrics(self) -> list[Reported]:
        return await reports_of(self.clients.values(), self.moves)

    async def _ping(self, model: str, client: ModelClient) -> str | None:
        """None, or why no replica answers. One that sleeps is not asked: that would wake it."""
        if client.may_sleep and await is_asleep(*client.names):
            return None
        response = client.ping.remote()
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                failed = await response
            return f"{model}: {failed.reason}" if isinstance(failed, EngineFailed) else None
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            message = await why_down(*client.names)
            return f"{model}: {message or f'no replica answers ({type(error).__name__})'}"
        finally:
            response.cancel()

    def _client(self, model: str) -> ModelClient:
        client = self.clients.get(model)
        if client is None:
            raise model_not_found(model, self.clients)
        return client

    async def _first_attempt(
        self, client: ModelClient, request: GenerateRequest, progress: Progress
    ) -> AsyncGenerator[RequestOutput]:
        """By one replica, or by one other, if there is one, when that has no room."""
        refusals: list[RequestError] = []
        while True:
            try:
                async with aclosing(self._attempt(client, request, progress)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except NoRoom as refusal:
                refusals.append(refusal.error)
                if len(refusals) == 2 or not client.fleet.running() - {refusal.replica}:
                    raise min(refusals, key=lambda error: error.retry_after or 0.0) from None
                self.moves.note("retried")
                request = avoiding(request, refusal.replica)

    def _attempt(
        self, client: ModelClient, request: GenerateRequest, progress: Progress
    ) -> AsyncGenerator[RequestOutput]:
        if self._bus is not None and request.output_kind is OutputKind.TOKENS:
            return over_bus(client, self._bus, request, self._pace, progress.taken_by)
        return over_handle(client, request, progress.taken_by)

    async def _resume(
        self, client: ModelClient, request: GenerateRequest, progress: Progress, *lost: str
    ) -> AsyncGenerator[RequestOutput]:
        """By the handle, from what was received; each unfinished choice on its own. `lost`:
        replicas not to go back to, "" where one is not known."""
        reason = "it cannot be resumed"
        for attempt in range(1, MAX_RESUMES + 1):
            if not progress.can_resume:
                break
            others = (*lost, *self._doubtful(client))
            rest = [(i, avoiding(each, *others)) for i, each in progress.unfinished(attempt)]
            is_whole = any(index is None for index, _ in rest)
            try:
                async with aclosing(
                    choices_over_handle(client, rest, progress.taken_by)
                ) as outputs:
                    async for output in outputs:
                        if changed := progress.take_change():
                            logger.warning(
                                "[Request] %s goes on under numerics %s: its text may differ",
                                *(request.request_id, changed),
                            )
                            yield RequestOutput(request.request_id, numerics_id=changed)
                        progress.note(output)
                        output = replace(output, request_id=request.request_id)
                        yield output if is_whole else replace(output, usage=None, timings=None)
                if not is_whole:  # the parts' counts are not the request's
                    yield RequestOutput(request.request_id, usage=progress.usage())
                return
            except (Lost, NoRoom, InvalidRequest) as error:
                if isinstance(error, InvalidRequest):
                    if error.param not in (ARTIFACT, ADAPTER):
                        raise
                else:
                    lost = (*lost, error.replica)
                    if isinstance(error, Lost):
                        client.fleet.suspect(error.replica)
                reason = str(error)
                logger.warning("[Request] %s: attempt %d: %s", request.request_id, attempt, error)
                await asyncio.sleep(min(self._resume_wait_s * 2**attempt, 2.0))
        raise Unavailable(f"the replica of this request was lost: {reason}", None, None, 1.0)

    def _doubtful(self, client: ModelClient) -> tuple[str, ...]:
        silent = self._bus.doubtful() if self._bus is not None else ()
        return (*client.fleet.suspects(), *silent)

    async def _pace(self) -> None:
        if interval := min(self._chunk_interval_s * self._num_open, MAX_CHUNK_INTERVAL_S):
            await asyncio.sleep(interval)


def _sum(each: list[Stats]) -> Stats:
    return Stats(**{f.name: sum(getattr(stats, f.name) for stats in each) for f in fields(Stats)})
