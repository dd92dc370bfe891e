"""Staging for replicas: by a Ray task on their own node, or directly where there is no Ray.

The only file of the optimizer that knows Ray; it is imported inside functions only.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.pipeline import find_staged, optimize
from optimizer.progress import LogProgress
from optimizer.recipe import Recipe, resolve_recipe
from optimizer.remote_store import fetch_artifact, is_url, open_places
from optimizer.sources import parse_source
from torchweave_ray.errors import ArtifactError, ConfigError, TorchWeaveError
from torchweave_ray.models.artifact import (
    MANIFEST,
    SEAL,
    WEIGHTS,
    Lease,
    hold_artifact,
    read_manifest,
    verify_artifact,
)

if TYPE_CHECKING:
    from optimizer.sources.remote_adapters import RemoteAdapters as RemoteAdapters

CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class StagingTask:
    """What the task that stages an artifact asks Ray for."""

    num_cpus: float = 0
    """0: a replica may hold them all while it waits for this task."""
    memory: int = 0
    """Bytes."""
    max_retries: int = 3
    """When the worker dies; the next one goes on where it was. Errors of ours are not retried."""


@dataclass(frozen=True, slots=True)
class ArtifactParts:
    """A staged artifact, to be put elsewhere."""

    documents: dict[str, bytes]
    """All but the weights, by name."""
    weights: Path
    sha256: str
    num_bytes: int
    """Of the weights."""
    lease: Lease


def stage_artifact(
    recipe: str | Recipe, store: str | Path | None = None, cache: str | Path | None = None
) -> Path:
    """Stage in this process, or wait for the process that does; returns the artifact's folder."""
    return optimize(recipe, store, LogProgress(), cache)


def check_recipe(recipe: str) -> None:
    """Raises ConfigError, naming the nearest recipe, for what can mean no model. Fetches nothing:
    whether a hub has that id is only found out when it is staged."""
    resolve_recipe(recipe)


def stage_task(recipe: Recipe, task: StagingTask, **options: Any) -> Any:
    """`stage_artifact` as a Ray remote function, which the dashboard shows as `stage:<recipe>`."""
    import ray

    return ray.remote(
        num_cpus=task.num_cpus,
        memory=task.memory or None,
        max_retries=task.max_retries,
        name=f"stage:{recipe.name}",
        **options,
    )(_stage_in_worker)


def stage_on_cluster(
    recipe: str,
    store: str | None,
    cache: str | None,
    address: str,
    task: StagingTask,
) -> Path:
    """Run the task on the Ray cluster at `address` ("auto": the one of this machine); the folder on
    the node that ran it. Its log lines are shown here. Raises as `ensure_staged`."""
    import ray

    resolved = resolve_recipe(recipe)
    try:
        host, colon, port = address.rpartition(":")
        if colon and port.isdecimal():  # where nobody listens, Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, log_to_driver=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {address!r}: {error}") from error
    try:
        return _run_task(resolved, store, cache, stage_task(resolved, task))
    finally:
        ray.shutdown()


def artifact_parts(directory: Path) -> ArtifactParts:
    """Of a checked artifact. Raises ArtifactError if it is gone."""
    lease = hold_artifact(directory)
    entry = read_manifest(directory).files[WEIGHTS]
    small = [p for p in directory.iterdir() if p.is_file() and p.name not in (WEIGHTS, SEAL)]
    documents = {path.name: path.read_bytes() for path in small}
    return ArtifactParts(documents, directory / WEIGHTS, entry.sha256, entry.size, lease)


def ensure_staged(
    recipe: str | Recipe,
    store: str | Path | None = None,
    model_dir: str | Path | None = None,
    full: bool = False,
    task: StagingTask | None = None,
    cache: str | Path | None = None,
) -> Path:
    """The folder of a checked artifact on this node. Blocks while it is staged: from a coroutine,
    call it in a thread.

    `store`, `cache`: as of `open_places`. `model_dir`: an artifact, a link or a URL to one, to take
    as it is; by default ARTIFACT_MODEL_DIR. `full`: hash every file instead of comparing
    size, mtime and inode. `task`: used where Ray runs. Raises ConfigError or ArtifactError, with
    the text to show a person.
    """
    chosen = model_dir or os.environ.get("ARTIFACT_MODEL_DIR")
    if chosen and is_url(str(chosen)):
        directory = fetch_artifact(str(chosen), cache, LogProgress())
    elif chosen:
        directory = Path(chosen).expanduser().resolve()
    else:
        directory = _staged(resolve_recipe(recipe), store, cache, task or StagingTask())
    verify_artifact(directory, full=full)
    return directory


def remote_adapters(
    url: str, store: str | Path | None = None, cache: str | Path | None = None
) -> RemoteAdapters:
    """LoRA adapters below a URL, kept beside the artifacts of this node. `store`, `cache`: as of
    `open_places`. Raises ConfigError for a URL that no driver knows."""
    from optimizer.sources.remote_adapters import RemoteAdapters

    parse_source(url, None)
    shelf, _ = open_places(store, cache)
    return RemoteAdapters(url, shelf.root / ".adapters")


def ensure_named(
    name: str,
    store: str | Path | None = None,
    cache: str | Path | None = None,
    full: bool = False,
    task: StagingTask | None = None,
) -> Path:
    """As `ensure_staged`, for a model beside the one that the environment may speak of: `name` is
    an artifact's folder, a URL of one, or a recipe."""
    if is_url(name) or Path(name).expanduser().joinpath(MANIFEST).is_file():
        return ensure_staged("", model_dir=name, full=full, cache=cache)
    directory = _staged(resolve_recipe(name), store, cache, task or StagingTask())
    verify_artifact(directory, full=full)
    return directory


def _staged(
    recipe: Recipe, store: str | Path | None, cache: str | Path | None, task: StagingTask
) -> Path:
    shelf, _ = open_places(store, cache)
    if (found := find_staged(recipe, shelf)) is not None:
        return found
    if not _ray_is_running():
        return stage_artifact(recipe, store, cache)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _run_task(recipe, store, cache, stage_task(recipe, task, scheduling_strategy=here))


def _run_task(
    recipe: Recipe, store: str | Path | None, cache: str | Path | None, remote: Any
) -> Path:
    import ray

    # The worker's folder and environment may be others: it gets what was found out here.
    shelf, shared = open_places(store, cache)
    places = (str(shelf.root), None) if shared is None else (shared.url, str(shelf.root))
    try:
        return Path(ray.get(remote.remote(recipe, *places)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TorchWeaveError):
            raise error.cause from None  # without the worker's traceback: it is for a person
        raise
    except ray.exceptions.RayError as error:
        raise ArtifactError(f"the task that stages {recipe.name} was lost: {error}") from error


def _stage_in_worker(recipe: Recipe, store: str, cache: str | None) -> str:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return str(stage_artifact(recipe, store, cache))


def _ray_is_running() -> bool:
    try:
        import ray
    except ImportError:
        return False  # staging works without Ray
    return bool(ray.is_initialized())
