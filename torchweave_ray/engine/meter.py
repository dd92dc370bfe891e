"""Tokens a second while there is work: the pace of prompts, and the calm [Scheduler] log line."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

from torchweave_ray.outputs import Stats

if TYPE_CHECKING:
    from torchweave_ray.engine.engine import Engine

logger = logging.getLogger(__name__)

_MEMORY_S = 5.0
_ENOUGH_S = 0.5
"""Of steps with prompts, before their pace is trusted."""


class PromptPace:
    """Prompt tokens a second beside the decodes there are; the last seconds count most."""

    def __init__(self) -> None:
        self._seconds = self._num_tokens = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        return self._num_tokens / self._seconds if self._seconds >= _ENOUGH_S else None

    def note(self, seconds: float, num_tokens: int) -> None:
        """One step took so long and computed so many tokens of prompts."""
        if num_tokens and seconds > 0:
            kept = math.exp(-seconds / _MEMORY_S)
            self._seconds = self._seconds * kept + seconds
            self._num_tokens = self._num_tokens * kept + num_tokens


class Meter:
    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._start: tuple[float, Stats] | None = None

    def measure(self, engine: Engine) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now, engine.stats()
        elif now - self._start[0] >= self._interval_s:
            stats, before = engine.stats(), self._start[1]
            seconds = now - self._start[0]
            self._start = now, stats
            generated = (stats.num_generated_tokens - before.num_generated_tokens) / seconds
            steps = stats.num_steps - before.num_steps
            logger.info(
                "[Scheduler] running=%d waiting=%d batch=%.1f kv=%.1f%% tokens/sec=%.1f",
                stats.num_running,
                stats.num_waiting,
                (stats.num_computed_tokens - before.num_computed_tokens) / max(steps, 1),
                100 * stats.kv_usage,
                generated,
            )

    def pause(self) -> None:
        self._start = None
