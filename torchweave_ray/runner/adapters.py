"""The LoRA adapters that a runner can use: found by name, loaded into its executor, let go.

Which are loaded when is the engine's (engine/adapters/pool.py). Any thread may call. The runner
reads by the hash of an adapter's content: equal names may come to mean different weights.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from torchweave_ray.config import LoraConfig
from torchweave_ray.errors import ArtifactError, ConfigError, InvalidRequest, ModelNotFound
from torchweave_ray.models.artifact import file_sha256
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.lora.fitted import Adaptable, FittedAdapter, fit
from torchweave_ray.models.lora.folder import AdapterFolder, AdapterSource, is_name
from torchweave_ray.models.lora.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraAdapter
from torchweave_ray.models.spec import Executor
from torchweave_ray.models.tensors import fused_tensors

logger = logging.getLogger(__name__)

FRESH_S = 1.0
"""An adapter found so recently is not looked for again."""


@dataclass(frozen=True, slots=True)
class _Found:
    adapter_id: str
    files: tuple[tuple[int, int, int], ...]
    """Size, mtime and inode of each."""
    seen_at: float


class AdapterStore:
    """Implements engine.adapters.pool.Adapters."""

    def __init__(
        self, source: AdapterSource, config: ModelConfig, executor: Adaptable, max_rank: int
    ) -> None:
        self._source = source
        self._tensors = fused_tensors(config)
        self._executor = executor
        self._max_rank = max_rank
        self._found: dict[str, _Found] = {}
        self._names: dict[str, str] = {}
        """By adapter id: a name that it was found under."""
        self._lock = threading.Lock()
        """Two requests for a new adapter fetch and read it once."""
        self.loaded: dict[str, object] = {}
        """By adapter id: what the executor made of it."""

    def names(self) -> list[str]:
        return self._source.names()

    def find(self, name: str) -> str:
        """The id of the adapter that is called so now; at once where it was found a second ago.

        Raises ModelNotFound with the names there are, InvalidRequest for one that is of no use.
        """
        found = self._found.get(name)
        if found is not None and time.monotonic() - found.seen_at < FRESH_S:
            return found.adapter_id
        with self._lock:
            return self._find(name)

    def load(self, adapter_id: str) -> None:
        """Raises ArtifactError if it was replaced since it was found."""
        started_at = time.perf_counter()
        name = self._names[adapter_id]
        folder = self._source.folder(name)
        if folder is None or _identity(folder) != adapter_id:
            raise ArtifactError(f"adapter {name!r} was replaced while a request waited for it")
        self.loaded[adapter_id] = self._executor.load_adapter(self._read(folder))
        seconds = time.perf_counter() - started_at
        logger.info("[Adapter] %s (%s) loaded in %.2f s", name, adapter_id, seconds)

    def drop(self, adapter_id: str) -> None:
        del self.loaded[adapter_id]
        logger.info("[Adapter] %s (%s) evicted", self._names[adapter_id], adapter_id)

    def reset(self) -> None:
        """Let go of all that is loaded."""
        self.loaded.clear()

    def release_memory(self) -> None:
        self.reset()
        del self._executor

    def restore_memory(self, executor: Executor) -> None:
        assert isinstance(executor, Adaptable)
        self._executor = executor

    def _find(self, name: str) -> str:
        folder = None
        try:
            folder = self._source.folder(name) if is_name(name) else None
            if folder is None:
                raise self._unknown(name)
            files, known = _stats(folder), self._found.get(name)
            if known is not None and known.files == files:
                adapter_id = known.adapter_id
            else:
                self._read(folder)
                adapter_id = _identity(folder)
        except (ArtifactError, OSError) as error:
            # A client need not know where it lies.
            said = str(error).replace(f"{folder}/", "").replace(str(folder), name)
            reason = f"adapter {name!r} cannot be used: {said}"
            raise InvalidRequest(reason, "model", "invalid_adapter") from error
        self._names[adapter_id] = name
        self._found[name] = _Found(adapter_id, files, time.monotonic())
        return adapter_id

    def _read(self, folder: Path) -> FittedAdapter:
        adapter = LoraAdapter(folder)
        if adapter.rank > self._max_rank:
            raise ArtifactError(f"its rank is {adapter.rank}, lora.max_rank {self._max_rank}")
        return fit(adapter, self._tensors)

    def _unknown(self, name: str) -> ModelNotFound:
        there_is = ", ".join(self.names()) or "none"
        said = f"no adapter {name!r}; there is {there_is}"
        return ModelNotFound(said, "model", "model_not_found")


def open_adapters(
    config: LoraConfig, source: AdapterSource | None, model: ModelConfig, executor: Executor
) -> AdapterStore | None:
    """None: the configuration asks for none. `source`: where it is no folder of this machine.

    Raises ConfigError for an executor that adapters cannot be added to, or a source that is not
    there.
    """
    if config.source is None:
        return None
    if not isinstance(executor, Adaptable):
        raise ConfigError(
            f"lora.source is set, but {executor.name} runs {model.architecture}: no "
            "adapters can be added to it"
        )
    if source is None and "://" in config.source:
        raise ConfigError(f"lora.source {config.source!r} is no folder here: a server fetches URLs")
    source = source or AdapterFolder(Path(config.source).expanduser())
    return AdapterStore(source, model, executor, config.max_rank)


def _identity(folder: Path) -> str:
    """Of its content; equal wherever the same adapter lies."""
    hashes = (file_sha256(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:24]


def _stats(folder: Path) -> tuple[tuple[int, int, int], ...]:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(f"{name} is missing")
    stats = [(folder / name).stat() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)
