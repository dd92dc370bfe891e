"""`Fleet`: the replicas of one model as this ingress's router sees them, and those that leave.

Serve lets a replica that it stops finish its streams, but not for ever: those that would outlive
the limit are moved, when another replica continues them identically.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deployments.calls import Alive

MOVE_AFTER_SHARE = 0.9
"""Of the time that a stopping replica has: what still runs then would outlive it."""
SUSPECT_S = 10.0
"""How long nothing goes, if it can be helped, to one that did not answer: longer than Serve
takes to find out."""


class Fleet:
    """`running`: ids of the replicas that take requests now."""

    def __init__(
        self,
        running: Callable[[], frozenset[str]],
        longest_stream_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.running = running
        self._move_after_s = MOVE_AFTER_SHARE * longest_stream_s
        self._forget_after_s = longest_stream_s
        self._clock = clock
        self._known: frozenset[str] = frozenset()
        self._left_at: dict[str, float] = {}
        self._suspected_at: dict[str, float] = {}
        self._numerics: Mapping[str, str] = {}
        """Of the replicas that could take over, as last asked."""

    def look(self) -> bool:
        """Note who has left; True: somebody's streams are due, so ask who else there is."""
        now, running = self._clock(), self.running()
        for replica in self._known - running:
            self._left_at[replica] = now
        self._known = running
        self._left_at = {
            replica: left_at
            for replica, left_at in self._left_at.items()
            if replica not in running and now - left_at < self._forget_after_s
        }
        return any(map(self._is_due, self._left_at))

    def note(self, alive: Sequence[Alive]) -> None:
        self._numerics = {each.replica: each.numerics_id for each in alive}

    def suspect(self, replica: str) -> None:
        """It was lost with a request, or never took one; "": nobody knows which."""
        if replica:
            self._suspected_at[replica] = self._clock()

    def suspects(self) -> tuple[str, ...]:
        now = self._clock()
        for replica, at in list(self._suspected_at.items()):
            if now - at >= SUSPECT_S:
                del self._suspected_at[replica]
        return tuple(self._suspected_at)

    def must_move(self, stream_of: Alive) -> bool:
        """Whether a stream of that replica goes on better elsewhere."""
        return self._is_due(stream_of.replica) and any(
            numerics_id == stream_of.numerics_id
            for replica, numerics_id in self._numerics.items()
            if replica in self._known
        )

    def _is_due(self, replica: str) -> bool:
        left_at = self._left_at.get(replica)
        return left_at is not None and self._clock() - left_at >= self._move_after_s


def running_replicas(handles: Sequence[Any]) -> frozenset[str]:
    """What the routers of these handles choose from; empty: nothing, or nobody has called yet.

    Serve's public API tells a number of replicas only.
    """
    for router in map(_request_router, handles):
        if router is not None:
            return frozenset(each.unique_id for each in router.curr_replicas)
    return frozenset()


def placed_on(handle: Any, request_id: str) -> str:
    """The replica that a request was last sent to, whether or not that took it; "": not known."""
    router = _request_router(handle)
    return "" if router is None else router.placed.get(request_id, "")


def _request_router(handle: Any) -> Any:
    router = getattr(getattr(handle, "_router", None), "_asyncio_router", None)
    return getattr(router, "request_router", None)
