"""How a replica gets its artifact: files of its node, or one copy in Ray's object store.

`WeightsOwner` is the deployment that puts weights into the store and owns them there; Ray carries
them to other nodes, and all replicas of a node map one copy. Knows no model formats.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.serve.handle import DeploymentHandle

from deployments.args import DEFAULT_RECIPE, StagingArgs
from deployments.log import log_through_serve
from deployments.placement import ReplicaConfig
from deployments.ranks.actors import RankActors, rank_actors
from optimizer.task import (
    StagingTask,
    artifact_parts,
    ensure_named,
    ensure_staged,
    remote_adapters,
)
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ArtifactError, TorchWeaveError
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimizer.task import RemoteAdapters
    from torchweave_ray.build import LoadedModel

logger = logging.getLogger(__name__)

TRIES = 3
"""To map weights whose owner may just be replaced."""


@dataclass(frozen=True, slots=True)
class Share:
    """An artifact in Ray's object store."""

    documents: dict[str, bytes]
    """Its small files by name."""
    weights: list[Any]
    """The one ObjectRef: in a list, it travels as itself."""
    sha256: str
    num_bytes: int


@asynccontextmanager
async def artifact_at_hand(
    config: ReplicaConfig, owner: DeploymentHandle | None, startup_s: dict[str, float]
) -> AsyncIterator[tuple[Path, NDArray[np.uint8] | None]]:
    """The folder of a checked artifact and, of one in the object store, its weights file [bytes];
    then the folder holds the rest of it, and is gone at the end.

    Adds its seconds to `startup_s`. Raises ConfigError or ArtifactError with the reason.
    """
    start = time.perf_counter()
    if owner is None:
        directory = await asyncio.to_thread(staged, config)
        startup_s["stage"] = time.perf_counter() - start
        yield directory, None
        return
    share, weights = await _mapped(owner)
    with tempfile.TemporaryDirectory(prefix="torchweave-artifact-") as folder:
        for name, content in share.documents.items():
            (Path(folder) / name).write_bytes(content)
        if config.verify == "full":
            await asyncio.to_thread(_check_hash, weights, share.sha256)
        startup_s["share"] = time.perf_counter() - start
        yield Path(folder), weights


def adapters_of(config: ReplicaConfig) -> RemoteAdapters | None:
    """Where the adapters of this model come from, if that is no folder."""
    lora = config.model.lora
    if lora is None or "://" not in lora.source:
        return None
    return remote_adapters(lora.source, config.artifact_dir, config.artifact_cache)


def staged(config: ReplicaConfig) -> Path:
    """The artifact's folder on this node. Blocks while it is staged."""
    model = config.model
    return ensure_staged(
        model.recipe or DEFAULT_RECIPE,
        store=config.artifact_dir,
        cache=config.artifact_cache,
        model_dir=model.artifact,
        full=config.verify == "full",
        task=_task(config.staging),
    )


Loaded = tuple["LoadedModel", Tokenizer, dict[str, bytes]]
"""A model, its tokenizer, and the tokenizer's files by name."""


async def load_at_hand(
    config: ReplicaConfig,
    engine: EngineConfig,
    owner: DeploymentHandle | None,
    startup_s: dict[str, float],
) -> Loaded:
    """All that a replica serves. Raises as `artifact_at_hand` does."""
    async with artifact_at_hand(config, owner, startup_s) as (folder, whole):
        launcher = rank_actors(config.placement) if config.model.num_ranks > 1 else None
        # In a thread: this loop answers Serve's own probes meanwhile.
        loaded = await asyncio.to_thread(load_served, config, engine, folder, whole, launcher)
        return loaded, load_tokenizer(folder), read_tokenizer_files(folder)


def load_served(
    config: ReplicaConfig,
    engine: EngineConfig,
    folder: Path,
    whole: NDArray[np.uint8] | None,
    launcher: RankActors | None = None,
) -> LoadedModel:
    """The replica's model with its adapters, and its draft model, which is staged first. Blocks
    meanwhile."""
    from torchweave_ray.build import load_model

    engine = _with_draft_staged(config, engine)
    return load_model(folder, engine, config.model.name, whole, adapters_of(config), launcher)


def _with_draft_staged(config: ReplicaConfig, engine: EngineConfig) -> EngineConfig:
    """With the draft model's folder on this node in place of its name."""
    speculation = engine.speculation
    if speculation.model is None:
        return engine
    directory = ensure_named(
        speculation.model,
        store=config.artifact_dir,
        cache=config.artifact_cache,
        full=config.verify == "full",
        task=_task(config.staging),
    )
    return replace(engine, speculation=replace(speculation, model=str(directory)))


def _task(staging: StagingArgs) -> StagingTask:
    return StagingTask(staging.num_cpus, staging.memory, staging.max_retries)


class WeightsOwner:
    """Serve restarts it when it dies: replicas keep what they have mapped, and new ones wait."""

    async def __init__(self, config: ReplicaConfig) -> None:  # type: ignore[misc]
        log_through_serve()
        self._config = config
        self._lock = asyncio.Lock()
        self._share: Share | None = None

    async def share(self) -> Share | TorchWeaveError:
        """Stages and puts what is not there yet; an error comes as a value and is tried again."""
        async with self._lock:
            if self._share is None:
                try:
                    self._share = await asyncio.to_thread(self._put)
                except TorchWeaveError as error:
                    return error
            return self._share

    def _put(self) -> Share:
        import numpy as np

        parts = artifact_parts(staged(self._config))
        _check_room(parts.num_bytes, "the weights")
        start = time.perf_counter()
        file = np.memmap(parts.weights, np.uint8, "r")
        ref = ray.put(np.asarray(file))
        _check_hash(ray.get(ref), parts.sha256)  # what the replicas will map
        self._lease = parts.lease  # a restart reads the folder again
        logger.info(
            "[Weights] %s: %.1f MB in the object store in %.1f s",
            *(parts.weights, parts.num_bytes / 1e6, time.perf_counter() - start),
        )
        return Share(parts.documents, [ref], parts.sha256, parts.num_bytes)


async def _mapped(owner: DeploymentHandle) -> tuple[Share, NDArray[np.uint8]]:
    """Views of this node's copy, which comes from another node if there is none yet."""
    lost: ray.exceptions.RayError | None = None
    for _ in range(TRIES):
        try:
            share = await owner.share.remote()
            if isinstance(share, TorchWeaveError):
                raise share
            return share, await asyncio.to_thread(_get, share)
        except ray.exceptions.RayError as error:
            logger.warning("[Weights] lost on their way, asked for again: %s", error)
            lost = error
    raise ArtifactError(f"the weights' owner cannot be reached: {lost}") from lost


def _get(share: Share) -> NDArray[np.uint8]:
    (ref,) = share.weights
    here = ray.get_runtime_context().get_node_id()
    locations = ray.experimental.get_object_locations([ref])
    if here not in locations.get(ref, {}).get("node_ids", ()):
        _check_room(share.num_bytes, "a copy of the weights")
    weights: NDArray[np.uint8] = ray.get(ref)
    return weights


def _check_room(num_bytes: int, what: str) -> None:
    """Raises ArtifactError where this node's object store is too small. Ray itself would put them
    into files on the disk, slowly and without a word."""
    from ray._private.state import available_resources_per_node

    here = ray.get_runtime_context().get_node_id()
    key = "object_store_memory"
    (total,) = (n["Resources"].get(key, 0) for n in ray.nodes() if n["NodeID"] == here)
    free = available_resources_per_node().get(here, {}).get(key, total)
    if num_bytes > free:
        raise ArtifactError(
            f"the object store of this node has {free / 1e6:.0f} MB free of {total / 1e6:.0f}, "
            f"{what} need {num_bytes / 1e6:.0f} MB: start Ray with a larger --object-store-memory "
            "(and /dev/shm), or set staging: files"
        )


def _check_hash(weights: NDArray[np.uint8], sha256: str) -> None:
    found = hashlib.sha256(weights.data).hexdigest()
    if found != sha256:
        raise ArtifactError(f"the weights were altered on their way: sha256 {found}, not {sha256}")
