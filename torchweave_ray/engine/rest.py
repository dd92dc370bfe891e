"""An engine's sleep: its memory given back while it has no work, taken again for the next request.

Called where the engine steps. Knows when, not what the memory is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Memory(Protocol):
    """Weights and KV cache of a runner between whose steps it is called."""

    def release(self) -> None: ...

    def restore(self) -> None:
        """Raises ArtifactError if the weights are not what they were."""
        ...


class Rest:
    def __init__(self, memory: Memory | None, let_go: Callable[[], bool]) -> None:
        """`memory`: None: it never sleeps. `let_go` has the engine forget what lies there; False:
        it has work."""
        self.is_sleeping = False
        self.num_wakes = 0
        self._memory = memory
        self._let_go = let_go

    def sleep(self) -> None:
        """Unless there is work."""
        if self.is_sleeping or self._memory is None or not self._let_go():
            return
        started_at = time.perf_counter()
        self._memory.release()
        self.is_sleeping = True
        seconds = time.perf_counter() - started_at
        logger.info("[Sleep] weights and KV cache let go in %.2f s", seconds)

    def wake(self) -> None:
        """Raises ArtifactError if the weights were altered meanwhile: the engine is of no use."""
        if not self.is_sleeping or self._memory is None:
            return
        started_at = time.perf_counter()
        self._memory.restore()
        self.is_sleeping = False
        self.num_wakes += 1
        logger.info("[Sleep] awake again after %.2f s", time.perf_counter() - started_at)
