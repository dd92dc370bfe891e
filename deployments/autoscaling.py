"""How many replicas a model needs: by slots, KV cache and prompt backlog. Stdlib only.

It travels by pickle to Serve's controller, which averages what the replicas record, bounds the
answer, and waits out the delays around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SEQUENCES, SLOTS = "sequences", "slots"
KV_USAGE, BACKLOG = "kv_usage", "backlog_tokens"


def recorded(sequences: int, slots: int, kv_usage: float, backlog: int) -> dict[str, float]:
    """What a replica tells the policy of itself."""
    return {
        SEQUENCES: float(sequences),
        SLOTS: float(slots),
        KV_USAGE: kv_usage,
        BACKLOG: float(backlog),
    }


class SlotsKvBacklog:
    """The most that any of three needs ask for; it shrinks only when none of them objects."""

    def __init__(self, target_load: float, max_backlog_tokens: int, slots: int) -> None:
        """`target_load`: the share of slots, or of KV blocks, that a replica should use;
        `slots` counts while no replica has reported its own."""
        self._target_load = target_load
        self._max_backlog_tokens = max_backlog_tokens
        self._slots = slots

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """(replicas wanted, no state of our own) of Serve's AutoscalingContext."""
        reported = ctx.aggregated_metrics or {}
        return self.wanted(reported, ctx.total_num_requests), {}

    def wanted(self, reported: Mapping[str, Mapping[Any, float]], num_requests: float) -> int:
        """`reported`: by name and replica; `num_requests`: that callers have open, where they
        are not with a replica yet."""
        slots = max(reported.get(SLOTS, {}).values(), default=self._slots)
        sequences = max(_sum(reported, SEQUENCES), num_requests)
        needs = (
            sequences / (self._target_load * slots),
            _sum(reported, KV_USAGE) / self._target_load,
            _sum(reported, BACKLOG) / self._max_backlog_tokens,
        )
        return math.ceil(round(max(needs), 3))  # an average never comes to exactly 0


def _sum(reported: Mapping[str, Mapping[Any, float]], name: str) -> float:
    return sum(reported.get(name, {}).values())
