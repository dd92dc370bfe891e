"""`Ledger`: one place that knows what is left of each key, where several ingresses ask for it.

Ingresses lease a little more than they need, so that most calls ask nobody. Knows no HTTP, no keys
and no Ray: a deployment makes an actor of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torchweave_ray.api.access.quota import SLOT_RETRY_S, Bucket

SILENT_S = 10.0
"""An ingress that has said nothing for so long is gone, and with it the calls it had open."""


@dataclass(frozen=True, slots=True)
class Grant:
    amount: float
    """What was leased: at least what was needed, or 0."""
    wait_s: float
    """When it is 0: until there may be enough."""
    level: float
    """What is left for others."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an ingress says of itself, often."""

    returned: Mapping[tuple[str, str], float]
    """By key and kind: leased and not needed, or used without a lease when it is negative."""
    slots: Mapping[str, int]
    """By key: calls that it has open, and places that it keeps for more."""


class Ledger:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._slots: dict[str, dict[str, int]] = {}
        """By ingress and key."""
        self._heard_at: dict[str, float] = {}

    async def lease(
        self, ingress: str, key: str, kind: str, limit: int, need: float, spare: float
    ) -> Grant:
        """Of "requests" or "tokens" a minute, or of "slots" at once."""
        self._note(ingress)
        if kind == "slots":
            return self._lease_slots(ingress, key, limit, int(need), int(spare))
        bucket = self._bucket(key, kind, limit)
        if wait_s := bucket.take(need):
            return Grant(0.0, wait_s, bucket.level)
        extra = max(0.0, min(spare, bucket.level))
        bucket.spend(extra)
        return Grant(need + extra, 0.0, bucket.level)

    async def report(self, ingress: str, report: Report) -> None:
        self._note(ingress)
        for each, amount in report.returned.items():
            if (bucket := self._buckets.get(each)) is not None:
                bucket.spend(-amount)
        self._slots[ingress] = dict(report.slots)

    def _lease_slots(self, ingress: str, key: str, limit: int, need: int, spare: int) -> Grant:
        taken = sum(slots.get(key, 0) for slots in self._slots.values())
        if taken + need > limit:
            return Grant(0.0, SLOT_RETRY_S, limit - taken)
        amount = min(need + spare, limit - taken)
        own = self._slots.setdefault(ingress, {})
        own[key] = own.get(key, 0) + amount
        return Grant(amount, 0.0, limit - taken - amount)

    def _bucket(self, key: str, kind: str, limit: int) -> Bucket:
        bucket = self._buckets.get((key, kind))
        if bucket is None:
            bucket = self._buckets[key, kind] = Bucket(limit, self._clock)
        elif bucket.limit != limit:
            bucket.set_limit(limit)
        return bucket

    def _note(self, ingress: str) -> None:
        now = self._heard_at[ingress] = self._clock()
        for other in [name for name, at in self._heard_at.items() if at < now - SILENT_S]:
            del self._heard_at[other]
            self._slots.pop(other, None)
