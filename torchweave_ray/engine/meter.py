"""What the engine thread notes of its steps: a calm log line, metrics.

And the timings of the last requests, which are logged when the engine dies.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchweave_ray.errors import RequestError
from torchweave_ray.metrics import EngineMetrics, reason_of
from torchweave_ray.outputs import FinishReason, GenerateRequest, RequestOutput, Stats
from torchweave_ray.tracing import tracing_from_environment

if TYPE_CHECKING:
    from torchweave_ray.engine.engine import Engine

logger = logging.getLogger(__name__)

_MAX_REMEMBERED = 256
"""Requests that ended; what a dying engine says of them holds no content."""


class Meter:
    def __init__(self, interval_s: float, model: str, engine: Engine) -> None:
        self._interval_s = interval_s
        self._engine = engine
        method = "none" if engine.drafter is None else engine.drafter.method
        max_num_seqs = engine.scheduler_config.max_num_seqs
        self.metrics = EngineMetrics(model, max_num_seqs, engine.stats, method)
        self._start: tuple[float, Stats] | None = None
        self._last_token: dict[str, float] = {}
        """When each open request had its last token."""
        self._tracing = tracing_from_environment()
        self._traced: dict[str, GenerateRequest] = {}
        self._ended: deque[dict[str, Any]] = deque(maxlen=_MAX_REMEMBERED)

    def measure(self, outputs: Sequence[RequestOutput], seconds: float) -> None:
        """One step took so long and gave these outputs."""
        now = time.monotonic()
        self.metrics.note_step(seconds, self._gap(outputs, now))
        for output in outputs:
            if output.is_last:
                self._end(output)
        if self._start is None:
            self._start = now, self._engine.stats()
        elif now - self._start[0] >= self._interval_s:
            self._log(self._engine.stats(), now)

    def refused(self, error: RequestError) -> None:
        self.metrics.note_refusal(error.code or type(error).__name__)

    def open(self, request: GenerateRequest) -> None:
        """Its spans need what the request was."""
        if self._tracing is not None:
            self._traced[request.request_id] = request

    def pause(self) -> None:
        self._start = None

    def dump(self) -> None:
        """Log what ran and what ended last, a JSON object a line."""
        now = time.monotonic()
        for request_id, at in self._last_token.items():
            entry = {"request_id": request_id, "s_since_last_token": round(now - at, 4)}
            logger.error("[Recent] open: %s", json.dumps(entry), extra=_of(request_id))
        for ended in self._ended:
            logger.error("[Recent] ended: %s", json.dumps(ended), extra=_of(ended["request_id"]))

    def _gap(self, outputs: Sequence[RequestOutput], now: float) -> float | None:
        """Mean time since the streams of this step had their last token."""
        total, number = 0.0, 0
        for output in outputs:
            last = self._last_token.get(output.request_id)
            if last is not None:
                total += now - last
                number += 1
            self._last_token[output.request_id] = now
        return total / number if number else None

    def _end(self, output: RequestOutput) -> None:
        del self._last_token[output.request_id]
        self.metrics.note_request(output)
        request = self._traced.pop(output.request_id, None)
        if request is not None and self._tracing is not None:
            self._tracing.note_request(request, output)
        usage, timings = output.usage, output.timings
        assert usage is not None
        entry: dict[str, Any] = {
            "request_id": output.request_id,
            "reason": reason_of(output),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        if timings is not None:
            for name in ("queue_s", "ttft_s", "total_s"):
                entry[name] = round(getattr(timings, name), 4)
        self._ended.append(entry)
        level = logging.WARNING if entry["reason"] == FinishReason.ERROR else logging.DEBUG
        if logger.isEnabledFor(level):
            extra = _of(output.request_id)
            logger.log(level, "[Request] ended: %s", json.dumps(entry), extra=extra)

    def _log(self, stats: Stats, now: float) -> None:
        assert self._start is not None
        seconds, before = now - self._start[0], self._start[1]
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


def _of(request_id: str) -> dict[str, str]:
    """For the log as JSON: the engine's thread is in no request's context."""
    return {"request_id": request_id}
