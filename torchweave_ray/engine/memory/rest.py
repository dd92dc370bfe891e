"""An engine's sleep: its memory given back while it has no work, taken again for the next request.

Called where the engine steps. Knows when, not what the memory is.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from torchweave_ray.engine.block_manager import BlockManager

if TYPE_CHECKING:
    from torchweave_ray.engine.engine import Engine

logger = logging.getLogger(__name__)

_SAVING_S = 1.0
"""For cached blocks that are not on the disk yet; a request that comes now waits for it."""


class Memory(Protocol):
    """Weights and KV cache of a runner between whose steps it is called."""

    def release(self) -> None: ...

    def restore(self) -> None:
        """Raises ArtifactError if the weights are not what they were."""
        ...


class Rest:
    def __init__(self, memory: Memory | None, engine: Engine, blocks: BlockManager) -> None:
        """`memory`: None: it never sleeps. `blocks`: the engine's."""
        self.is_sleeping = False
        self.num_wakes = 0
        self._memory = memory
        self._engine = engine
        self._blocks = blocks

    def sleep(self) -> None:
        """Unless there is work."""
        is_busy = self._engine.has_work or self._engine.adapters.is_loading
        if self.is_sleeping or self._memory is None or is_busy:
            return
        started_at = time.perf_counter()
        self._forget()
        self._memory.release()
        self.is_sleeping = True
        seconds = time.perf_counter() - started_at
        logger.info("[Sleep] weights and KV cache let go in %.2f s", seconds)

    def _forget(self) -> None:
        """What lies in the memory."""
        engine = self._engine
        engine.forget_released()
        engine.spill.flush(_SAVING_S)
        self._blocks.forget_cache()
        if engine.drafter is not None:
            engine.drafter.forget_cache()
        engine.adapters.forget()

    def wake(self) -> None:
        """Raises ArtifactError if the weights were altered meanwhile: the engine is of no use."""
        if not self.is_sleeping or self._memory is None:
            return
        started_at = time.perf_counter()
        self._memory.restore()
        self.is_sleeping = False
        self.num_wakes += 1
        logger.info("[Sleep] awake again after %.2f s", time.perf_counter() - started_at)
