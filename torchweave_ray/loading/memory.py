"""The memory of a loaded model, let go and taken again: weights unmapped, KV cache freed,
of its draft model too.

The artifact stays held, so that nobody deletes it meanwhile. Knows no engine.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torchweave_ray.drafting import LoadedDraft
from torchweave_ray.models.artifact import verify_artifact
from torchweave_ray.models.spec import Executor
from torchweave_ray.runner.adapters import AdapterStore
from torchweave_ray.runner.backends import sampler_of
from torchweave_ray.runner.device import release_cached_memory
from torchweave_ray.runner.model_runner import ModelRunner


class ModelMemory:
    """Implements engine.memory.rest.Memory."""

    def __init__(
        self,
        runner: ModelRunner,
        adapters: AdapterStore | None,
        draft: LoadedDraft | None,
        reopen: Callable[[], Executor],
        directory: Path | None,
        release_others: Callable[[], None] = lambda: None,
    ) -> None:
        """`reopen` maps the weights again. `directory`: with their file, which is checked before;
        None: they are in memory that others hold. `release_others`: those of other ranks."""
        self._runner = runner
        self._adapters = adapters
        self._draft = draft
        self._reopen = reopen
        self._directory = directory
        self._release_others = release_others

    def release(self) -> None:
        self._runner.release_memory()
        self._release_others()
        if self._draft is not None:
            self._draft.runner.release_memory()
        if self._adapters is not None:
            self._adapters.release_memory()
        gc.collect()
        release_cached_memory()
        with suppress(OSError, AttributeError):  # glibc keeps what was freed, unless it is told
            ctypes.CDLL(None).malloc_trim(0)

    def restore(self) -> None:
        if self._directory is not None:
            verify_artifact(self._directory)
        executor = self._reopen()
        self._runner.restore_memory(executor, sampler_of(executor))
        if self._draft is not None:
            verify_artifact(self._draft.directory)
            own = self._draft.reopen(executor)
            self._draft.runner.restore_memory(own, sampler_of(own))
        if self._adapters is not None:
            self._adapters.restore_memory(executor)
