"""`ModelReplica`: one engine behind Serve. Stages its artifact, loads it, answers calls.

Control comes by handle calls; tokens leave by the bus, or as items of the call. Everything heavy
is imported when the replica starts: the builder imports this file too.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.args import limits_of
from deployments.autoscaling import recorded
from deployments.beats import with_beats
from deployments.bus.sender import BusError, BusSender
from deployments.calls import (
    Alive,
    BusFailed,
    CallResult,
    Description,
    EngineFailed,
    Finished,
    StreamItem,
    as_value,
)
from deployments.cpu_policy import compute_at_once
from deployments.log import log_start, log_through_serve, says_why_it_fails
from deployments.observe.metrics import mirrored
from deployments.placement import ReplicaConfig
from deployments.router import own_id, routing_stats
from deployments.staging import Loaded, load_at_hand
from torchweave_ray.api.streams.records import StreamRecords
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ConfigError, EngineError, RequestError, TorchWeaveError
from torchweave_ray.kernels.machine import num_cores
from torchweave_ray.outputs import GenerateRequest, RequestOutput, Stats
from torchweave_ray.reported import Reported

logger = logging.getLogger(__name__)


class ModelReplica:
    # Serve awaits it, inside the loop that the engine and the bus then live on.
    @says_why_it_fails
    async def __init__(  # type: ignore[misc]
        self, config: ReplicaConfig, weights: DeploymentHandle | None = None
    ) -> None:
        """`weights`: their owner, where they are in Ray's object store."""
        log_through_serve()
        compute_at_once()
        cores = num_cores()
        engine_config = config.engine_config(cores)
        # Ray says 1 here for a replica of one CPU, and OpenMP takes it for every new thread, the
        # engine's too. It is read when torch is loaded, which must not have happened yet.
        os.environ["OMP_NUM_THREADS"] = str(engine_config.runner.threads)
        from torchweave_ray.build import build_engine
        from torchweave_ray.engine.async_engine import AsyncEngine

        self._startup_s: dict[str, float] = {}
        self._model = config.model
        self._serves = False
        """From the first check of its health on, which Serve makes before it sends requests."""
        self._streams = StreamRecords()
        loaded, tokenizer, self._files = await self._load(config, engine_config, weights)
        self._startup_s.update(loaded.startup_s)
        self._info = loaded.info
        self._id = own_id()
        self._alive = Alive(self._id, loaded.info.artifact_id, loaded.info.numerics_id)
        self._bus = BusSender(f"{loaded.info.id}:{os.getpid()}", self._alive)
        self._engine = AsyncEngine(
            build_engine(loaded, engine_config, tokenizer),
            loaded.info,
            stats_interval_s=engine_config.stats_interval_s,
            after_step=self._bus.flush,
            sleep_after_s=config.model.sleep_after_s,
        )
        self._engine.start()
        metrics = self._engine.meter.metrics
        metrics.note_start(self._startup_s, self._id)
        self._mirror = mirrored(metrics, metrics.labels)
        sharing = config.placement.replicas_per_device
        log_start(
            loaded.info, self._startup_s, engine_config.runner.threads or cores, cores, sharing
        )

    async def _load(self, config: ReplicaConfig, engine: EngineConfig, weights: Any) -> Loaded:
        return await load_at_hand(config, engine, weights, self._startup_s)

    def __del__(self) -> None:  # by Serve, once the last stream is over; or of a failed start
        if hasattr(self, "_engine") and self._engine.is_on_its_loop:
            self._engine.close()

    async def generate(self, request: GenerateRequest, stream_id: int) -> CallResult:
        """Tokens go by the bus to `request.delivery`; stays open until the last one has left."""
        with self._streams.keep(request):
            return await self._generate(request, stream_id)

    async def _generate(self, request: GenerateRequest, stream_id: int) -> CallResult:
        ended: asyncio.Future[RequestOutput | TorchWeaveError | BusFailed]
        ended = asyncio.get_running_loop().create_future()

        def end(how: RequestOutput | TorchWeaveError | BusFailed) -> None:
            if not ended.done():
                ended.set_result(how)

        assert request.delivery is not None, "a call for the bus carries the bus's address"
        try:
            lost = BusFailed("the ingress's bus connection was lost")
            stream = await self._bus.open(request.delivery, stream_id, lambda: end(lost))
        except BusError as error:
            return BusFailed(str(error))

        def sink(item: RequestOutput | TorchWeaveError) -> None:
            if isinstance(item, TorchWeaveError):
                end(item)
                return
            stream.send(item)
            if item.is_last:
                end(item)  # whoever waits goes on after this step's flush

        try:
            await self._engine.prepare(request)
            self._engine.add(request, sink)
            how = await ended
        except TorchWeaveError as error:
            how = error
        finally:
            self._engine.abort(request.request_id)
            stream.close()
        if isinstance(how, RequestOutput):
            assert how.usage is not None
            return Finished(stream.num_entries, how.usage, how.timings)
        return how if isinstance(how, BusFailed) else as_value(how, self._id)

    async def generate_stream(self, request: GenerateRequest) -> AsyncGenerator[StreamItem]:
        """Everything as items of this call, and signs of life between them."""
        try:
            with self._streams.keep(request):
                alive = with_beats(self._engine.generate(request), self._alive)
                async with aclosing(alive) as items:
                    async for item in items:
                        yield item
        except TorchWeaveError as error:
            yield as_value(error, self._id)
        finally:
            self._engine.abort(request.request_id)  # the caller may have left

    async def alive(self) -> Alive:
        return self._alive

    async def stop(self, call_id: str) -> bool:
        """End the requests of a call, whichever ingress they came from; False: none is here."""
        return await self._engine.stop(call_id)

    async def recall(self, call_id: str) -> list[GenerateRequest]:
        """Requests that were here of a call whose stream is to go on."""
        return self._streams.recall(call_id)

    async def adapter(self, name: str) -> str | RequestError:
        """The id of an adapter, which is fetched if need be."""
        try:
            return (await self._engine.info(f"{self._info.id}:{name}")).adapter_id
        except RequestError as error:
            return error

    async def adapters(self) -> list[str]:
        return [info.adapter for info in await self._engine.models() if info.adapter]

    async def describe(self) -> Description:
        return Description(self._info, self._files, self._startup_s)

    async def sleeping(self, want: bool | None) -> bool:
        """Sleep while there is no work, wake up, or neither; whether it sleeps now."""
        return all(*(await self._engine.sleeping(None, want)).values())

    async def stats(self) -> Stats:
        return self._engine.snapshot()

    async def metrics(self) -> Reported:
        return self._engine.meter.metrics.report()

    def record_routing_stats(self) -> dict[str, float]:
        """Asked by Serve, for the routers of all ingresses."""
        return routing_stats(self._engine.snapshot())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the model is autoscaled, for deployments/autoscaling.py."""
        stats = self._engine.snapshot()
        sequences, slots = stats.num_running + stats.num_waiting, self._engine.max_num_seqs
        return recorded(sequences, slots, stats.kv_usage, stats.num_waiting_tokens)

    async def ping(self) -> EngineFailed | None:
        """None when this replica can answer requests."""
        try:
            self._engine.check_health()
        except EngineError as error:
            return EngineFailed(str(error))
        return None

    def check_health(self) -> None:
        """Called by Serve, which replaces this replica when it raises."""
        self._engine.check_health()
        self._serves = True

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Limits within this replica's capacity, in place. Serve may call it twice.

        Raises ConfigError before this replica serves; later a bad one changes nothing.
        """
        try:
            self._engine.update_limits(**limits_of(self._model, user_config))
        except ConfigError as error:
            if not self._serves:
                raise
            # Serve would stop every replica that raises: a typo must not end what runs well.
            logger.error("[Config] refused, limits stay as they were: %s", error)
            return
        logger.info("[Config] limits: %s", dict(user_config) or "as started")
