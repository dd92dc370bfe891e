"""Which replica takes a request: the one with the least to compute before its first token.

Runs in the process that calls, an instance for each ingress, and travels there by pickle: standard
library and Ray only. What it knows of a request is its `routing` (outputs.RoutingHint).
"""

from __future__ import annotations

import random
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

if TYPE_CHECKING:
    from torchweave_ray.outputs import RoutingHint, Stats

REQUEST_TOKENS = 64
"""What one more request on a replica weighs, in prompt tokens still to be computed."""
LOAD_WINDOW = 2
LOAD_RATIO = 1.25
"""A replica is crowded above ratio x (the least load) + window: then it is only taken when all
are. However good a match is, it never makes one replica much busier than the others."""
WAKE_TOKENS = 1024
"""What waking a replica weighs."""
KV_FULL = 0.9
"""Share of KV blocks held by sequences from which on a replica counts as crowded."""
HOME_TOKENS = REQUEST_TOKENS
HOME_SHARE = 1.25
"""A beginning that nobody has goes to its home by hash, which all ingresses agree on, unless that
is busier than another or would get more than this many times its fair share (consistent hashing
with bounded loads, Mirrokni et al. 2018)."""
ANCHOR_TOKENS = 64
"""A prompt's home is that of its first tokens: later turns of a conversation keep it."""
NUM_SESSIONS = 10_000
NUM_PLACED = 10_000
CAPACITY_TOKENS = 100_000
"""Of a replica's cache, until it has said how much it holds."""
SUSPECT_S = 5.0
"""How long a replica that could not be reached comes last: Serve finds out meanwhile."""


def routing_stats(stats: Stats) -> dict[str, float]:
    """What a replica reports, so coarse that it seldom changes: every change is sent to every
    ingress."""
    requests = stats.num_running + stats.num_waiting
    step = max(1, 1 << max(0, requests.bit_length() - 3))
    return {
        "requests": requests // step * step,
        "waiting": stats.num_waiting_tokens // 512 * 512,
        "kv": round(stats.kv_usage * 20) / 20,
        "capacity": stats.num_cacheable_tokens,
        "asleep": stats.num_asleep,
    }


def own_id() -> str:
    """What the router calls the replica that asks; "": there is no cluster."""
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return ""


@dataclass(frozen=True, slots=True)
class View:
    """One replica as it looks from here, for one request."""

    id: str
    load: int = 0
    """Requests there."""
    waiting_tokens: int = 0
    kv_usage: float = 0.0
    matched_tokens: int = 0
    """Of the request's beginning, probably in its cache."""
    owned_tokens: int = 0
    """Sent there from here and probably still in its cache."""
    is_avoided: bool = False
    is_asleep: bool = False
    """Its cache is empty, whatever was sent there."""


def rank(views: Sequence[View], num_tokens: int, anchor: bytes) -> list[str]:
    """Ids, best first. `anchor`: what decides the home of a prompt that nobody has; b"": nothing.

    The cost of a replica is the tokens that it computes before this request's first one.
    """
    window = LOAD_RATIO * min(view.load for view in views) + LOAD_WINDOW
    is_new = bool(anchor) and not any(view.matched_tokens for view in views)
    home = _home(views, num_tokens, anchor) if is_new else None

    def key(view: View) -> tuple[bool, bool, float, int, float]:
        is_crowded = view.load > window or view.kv_usage >= KV_FULL
        to_compute = max(0, num_tokens - view.matched_tokens) + view.waiting_tokens
        to_compute += WAKE_TOKENS if view.is_asleep else 0
        cost = to_compute + REQUEST_TOKENS * view.load - (HOME_TOKENS if view.id == home else 0)
        return (view.is_avoided, is_crowded, cost, view.owned_tokens, random.random())

    return [view.id for view in sorted(views, key=key)]


def _home(views: Sequence[View], num_tokens: int, anchor: bytes) -> str:
    """By rendezvous hashing among those that own no more than their share."""
    share = HOME_SHARE * (sum(view.owned_tokens for view in views) + num_tokens) / len(views)
    fair = [view.id for view in views if view.owned_tokens <= share]  # the least always is
    return max(fair, key=lambda id_: blake2b(anchor + id_.encode(), digest_size=8).digest())


class Memory:
    """What one replica probably has in its cache: the beginnings sent there, by their marks.

    Forgets as the cache does: what was used longest ago first, ends before beginnings.
    """

    def __init__(self) -> None:
        self._tokens: OrderedDict[bytes, int] = OrderedDict()
        self.num_tokens = 0

    def matched(self, marks: Sequence[tuple[int, bytes]]) -> int:
        """Tokens of the longest beginning that is known."""
        for num_tokens, mark in reversed(marks):
            if mark in self._tokens:
                return num_tokens
        return 0

    def add(self, marks: Sequence[tuple[int, bytes]], capacity: int) -> None:
        starts = [0, *(num_tokens for num_tokens, _ in marks)]
        for start, (end, mark) in reversed(list(zip(starts, marks, strict=False))):
            if mark in self._tokens:
                self._tokens.move_to_end(mark)
            else:
                self._tokens[mark] = end - start
                self.num_tokens += end - start
        while self.num_tokens > capacity and self._tokens:
            self.num_tokens -= self._tokens.popitem(last=False)[1]

    def forget(self, mark: bytes) -> None:
        self.num_tokens -= self._tokens.pop(mark, 0)


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray's base class is not typed
    """Never waits and never asks a replica: it goes by what was sent and what came back."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._memories: dict[str, Memory] = {}
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._suspects: dict[ReplicaID, float] = {}
        self._chosen: Counter[ReplicaID] = Counter()
        """Counted as load when they were chosen, not sent yet."""
        self.placed: OrderedDict[str, str] = OrderedDict()
        """Of the last requests, by their ids, the replica that each was sent to."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        hint = _hint(pending_request)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        views = [self._view(id_, replica, hint) for id_, replica in by_id.items()]
        num_tokens = hint.num_tokens if hint is not None else 0
        ids = rank(views, num_tokens, _anchor(hint))
        self._place(pending_request, ids[0])
        if pending_request is not None and not pending_request.routing_context.should_backoff:
            # Else Serve asks again and again without a pause.
            pending_request.routing_context.should_backoff = True
            self._count(by_id[ids[0]], hint)
        return [[by_id[id_]] for id_ in ids]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        if self._chosen[replica_id]:
            self._chosen[replica_id] -= 1  # it counts already
        else:
            super().on_send_request(replica_id)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        if (hint := _hint(pending_request)) is not None:
            self._remember(replica_id, self.curr_replicas.get(replica_id), hint)

    def _count(self, replica: RunningReplica, hint: RoutingHint | None) -> None:
        """At once: of a burst, Serve has all requests placed before it sends the first one."""
        replica_id = replica.replica_id
        self._chosen[replica_id] += 1
        self.replica_queue_len_cache.update(replica_id, self._load(replica) + 1)
        if hint is not None:
            self._remember(replica_id, replica, hint)

    def _place(self, pending_request: PendingRequest | None, replica: str) -> None:
        if request_id := getattr(_request(pending_request), "request_id", ""):
            self.placed[request_id] = replica
            if len(self.placed) > NUM_PLACED:
                self.placed.popitem(last=False)

    def _remember(
        self, replica_id: ReplicaID, replica: RunningReplica | None, hint: RoutingHint
    ) -> None:
        chosen = replica_id.unique_id
        capacity = _number(replica, "capacity") or CAPACITY_TOKENS
        self._memories.setdefault(chosen, Memory()).add(hint.marks, int(capacity))
        for refused in hint.avoid:
            if refused in self._memories and hint.marks:
                self._memories[refused].forget(hint.marks[-1][1])  # it never got there
        if hint.session:
            self._sessions[hint.session] = chosen
            self._sessions.move_to_end(hint.session)
            if len(self._sessions) > NUM_SESSIONS:
                self._sessions.popitem(last=False)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        present = {replica.replica_id.unique_id for replica in replicas}
        self._memories = {id_: m for id_, m in self._memories.items() if id_ in present}
        self._suspects = {r: until for r, until in self._suspects.items() if r.unique_id in present}
        self._chosen = Counter({r: n for r, n in self._chosen.items() if r.unique_id in present})

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._suspects[replica_id] = time.monotonic() + SUSPECT_S

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._suspects.pop(replica_id, None)

    def _view(self, id_: str, replica: RunningReplica, hint: RoutingHint | None) -> View:
        memory = self._memories.get(id_)
        is_asleep, matched = _number(replica, "asleep") > 0, 0
        is_avoided = self._is_suspect(replica)
        if hint is not None:
            is_avoided |= id_ in hint.avoid
            if hint.session and self._sessions.get(hint.session) == id_:
                matched = hint.num_tokens
            elif memory is not None and not is_asleep:
                matched = memory.matched(hint.marks)
        return View(
            id_,
            self._load(replica),
            int(_number(replica, "waiting")),
            _number(replica, "kv"),
            matched,
            memory.num_tokens if memory is not None else 0,
            is_avoided,
            is_asleep,
        )

    def _is_suspect(self, replica: RunningReplica) -> bool:
        return self._suspects.get(replica.replica_id, 0.0) > time.monotonic()

    def _load(self, replica: RunningReplica) -> int:
        """Serve's count is right as of the last call from here. When that is long ago, the
        replica's own is, and Serve need not ask for it, which may take a busy one too long."""
        load: int | None = self.replica_queue_len_cache.get(replica.replica_id)
        if load is None:
            load = int(_number(replica, "requests"))
            if not self._is_suspect(replica):
                self.replica_queue_len_cache.update(replica.replica_id, load)
        return load


def _hint(pending_request: PendingRequest | None) -> RoutingHint | None:
    """The RoutingHint of a generate call; None for other calls."""
    return getattr(_request(pending_request), "routing", None)


def _request(pending_request: PendingRequest | None) -> Any:
    args: Iterable[Any] = pending_request.args if pending_request is not None else ()
    return next(iter(args), None)


def _anchor(hint: RoutingHint | None) -> bytes:
    if hint is None:
        return b""
    if hint.session:
        return hint.session.encode()
    first = [mark for num_tokens, mark in hint.marks if num_tokens <= ANCHOR_TOKENS]
    return first[-1] if first else b""


def _number(replica: RunningReplica | None, name: str) -> float:
    """A stat of a replica; 0 while it has reported none."""
    stats = replica.routing_stats if replica is not None else None
    value = stats.get(name) if isinstance(stats, Mapping) else None
    return float(value) if isinstance(value, int | float) else 0.0
