"""Tokens a second while there is work, and the calm [Scheduler] log line."""

from __future__ import annotations

import logging
import time

from torchweave_ray.engine.engine import Engine
from torchweave_ray.outputs import Stats

logger = logging.getLogger(__name__)


class Meter:
    def __init__(self, interval_s: float) -> None:
        self.computed_per_s = 0.0
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
            self.computed_per_s = (stats.num_computed_tokens - before.num_computed_tokens) / seconds
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
