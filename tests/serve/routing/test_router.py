"""The choice of a replica: costs, windows, homes, memory; and the router that Serve calls."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve._private.common import ReplicaID as MakeReplicaID
from ray.serve._private.request_router.common import RequestRoutingContext

from deployments import router as router_module
from deployments.router import (
    HOME_SHARE,
    KV_FULL,
    LOAD_RATIO,
    LOAD_WINDOW,
    Memory,
    PrefixRouter,
    View,
    rank,
    routing_stats,
)
from torchweave_ray.block_hash import prefix_marks, root_hash
from torchweave_ray.outputs import GenerateRequest, RoutingHint, Stats
from torchweave_ray.sampling_params import SamplingParams

BLOCK = 16
APP = DeploymentID("ModelReplica:m", "app")


def marks(ids: Sequence[int]) -> tuple[tuple[int, bytes], ...]:
    return prefix_marks(root_hash("artifact"), ids, BLOCK)


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 1000 for i in range(length)]


def idle(num: int = 3) -> list[View]:
    return [View(f"r{i}") for i in range(num)]


def test_the_longest_match_wins() -> None:
    views = [View("a", matched_tokens=64), View("b", matched_tokens=320), View("c")]
    assert rank(views, 400, b"x") == ["b", "a", "c"]


def test_a_match_never_makes_a_replica_much_busier_than_the_others() -> None:
    busy = View("a", load=int(LOAD_RATIO * 4 + LOAD_WINDOW) + 1, matched_tokens=10_000)
    others = [View("b", load=4), View("c", load=5)]
    assert rank([busy, *others], 10_000, b"x")[-1] == "a"
    assert rank([replace(busy, load=6), *others], 10_000, b"x")[0] == "a"


def test_waiting_tokens_and_requests_weigh_as_much_as_tokens_to_compute() -> None:
    assert rank([View("a", waiting_tokens=512, matched_tokens=320), View("b")], 400, b"")[0] == "b"
    assert rank([View("a", load=1, matched_tokens=320), View("b")], 400, b"")[0] == "a"
    assert rank([View("a", load=1, matched_tokens=32), View("b")], 400, b"")[0] == "b"


def test_a_full_cache_comes_after_the_others_but_is_taken_when_all_are_full() -> None:
    full = View("a", kv_usage=KV_FULL, matched_tokens=400)
    assert rank([full, View("b")], 400, b"x") == ["b", "a"]
    assert rank([full, View("b", kv_usage=1.0)], 400, b"x") == ["a", "b"]


def test_whoever_refused_comes_last() -> None:
    views = [View("a", matched_tokens=400, is_avoided=True), View("b", load=50), View("c", load=60)]
    assert rank(views, 400, b"x") == ["b", "c", "a"]
    assert rank([View("a", is_avoided=True)], 400, b"x") == ["a"]


def test_equals_share_by_chance() -> None:
    firsts = Counter(rank(idle(), 0, b"")[0] for _ in range(300))
    assert len(firsts) == 3
    assert min(firsts.values()) > 50


def test_homes_are_stable_spread_and_move_little_when_a_replica_comes() -> None:
    anchors = [f"anchor {i}".encode() for i in range(300)]
    homes = [rank(idle(), 100, anchor)[0] for anchor in anchors]
    assert homes == [rank(idle(), 100, anchor)[0] for anchor in anchors]
    assert min(Counter(homes).values()) > 60
    moved = [rank(idle(4), 100, anchor)[0] for anchor in anchors]
    assert {new for old, new in zip(homes, moved, strict=True) if new != old} == {"r3"}


def test_a_home_gets_no_more_than_its_share() -> None:
    owned = dict.fromkeys(("r0", "r1", "r2"), 0)
    for i in range(60):
        views = [View(id_, owned_tokens=tokens) for id_, tokens in owned.items()]
        owned[rank(views, 100, f"anchor {i}".encode())[0]] += 100
    assert max(owned.values()) <= HOME_SHARE * sum(owned.values()) / 3 + 100


def test_a_match_beats_a_home() -> None:
    """A conversation that load has moved stays where it then was."""
    for i in range(20):
        views = [View("a", matched_tokens=16), View("b"), View("c")]
        assert rank(views, 100, f"anchor {i}".encode())[0] == "a"


@given(
    st.lists(
        st.builds(
            View,
            id=st.uuids().map(str),
            load=st.integers(0, 50),
            waiting_tokens=st.integers(0, 5000),
            kv_usage=st.floats(0, 1),
            matched_tokens=st.integers(0, 2000),
            owned_tokens=st.integers(0, 100_000),
            is_avoided=st.booleans(),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda view: view.id,
    ),
    st.integers(0, 2000),
    st.binary(max_size=8),
)
def test_every_replica_is_ranked_and_the_first_is_never_crowded_without_need(
    views: list[View], num_tokens: int, anchor: bytes
) -> None:
    ids = rank(views, num_tokens, anchor)
    assert sorted(ids) == sorted(view.id for view in views)
    first = next(view for view in views if view.id == ids[0])
    window = LOAD_RATIO * min(view.load for view in views) + LOAD_WINDOW
    willing = [v for v in views if not v.is_avoided and v.load <= window and v.kv_usage < KV_FULL]
    assert first in willing or not willing


@given(st.lists(st.integers(0, 3), max_size=700), st.lists(st.integers(0, 3), max_size=100))
def test_marks_of_a_longer_prompt_begin_with_those_of_a_shorter(a: list[int], b: list[int]) -> None:
    short, long = marks(a), marks(a + b)
    assert long[: len(short)] == short
    assert all(num_tokens % BLOCK == 0 and num_tokens <= len(a + b) for num_tokens, _ in long)
    if len(a) >= BLOCK:
        assert short[-1][0] >= len(a) // BLOCK * BLOCK * 3 // 4


def test_marks_are_few_and_depend_on_the_root() -> None:
    ids = prompt(1, 100_000)
    assert len(marks(ids)) < 40
    assert len(pickle.dumps(RoutingHint(len(ids), marks(ids)))) < 1_000
    other = prefix_marks(root_hash("artifact", "tenant"), ids, BLOCK)
    assert not {mark for _, mark in other} & {mark for _, mark in marks(ids)}


def test_memory_forgets_the_oldest_ends_first() -> None:
    memory = Memory()
    first, second = marks(prompt(1, 400)), marks(prompt(2, 400))
    memory.add(first, 700)
    memory.add(second, 700)
    assert memory.num_tokens <= 700
    assert 0 < memory.matched(first) < first[-1][0]
    assert memory.matched(second) == second[-1][0]
    memory.add(marks(prompt(3, 4000)), 700)
    assert memory.matched(first) == 0
    memory.forget(b"unknown")
    memory.add((), 0)
    assert memory.num_tokens == 0


def test_reported_stats_are_coarse() -> None:
    stats = Stats(33, 2, num_waiting_tokens=700, num_blocks=100, num_cacheable_tokens=1600)
    reported = routing_stats(replace(stats, num_free_blocks=58))
    assert reported == {"requests": 32, "waiting": 512, "kv": 0.4, "capacity": 1600, "asleep": 0}
    again = replace(stats, num_running=34, num_waiting_tokens=900, num_free_blocks=59)
    assert routing_stats(again) == reported
    zeros = {"requests": 0, "waiting": 0, "kv": 0, "capacity": 0, "asleep": 0}
    assert routing_stats(Stats()) == zeros


@dataclass
class Replica:
    """What the router reads of a replica."""

    name: str
    routing_stats: Any = field(default_factory=dict)
    max_ongoing_requests: int = 10_000

    @property
    def replica_id(self) -> Any:
        return MakeReplicaID(self.name, APP)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


@dataclass
class Pending:
    args: list[Any]
    routing_context: RequestRoutingContext = field(default_factory=RequestRoutingContext)


class Routed:
    """A router of its own, as one ingress has, and the replicas that it chooses from."""

    def __init__(self, *names: str) -> None:
        self.replicas = [Replica(name) for name in names]
        # As it arrives in another process: by value.
        cloudpickle.register_pickle_by_value(router_module)
        kind = pickle.loads(cloudpickle.dumps(PrefixRouter))
        cloudpickle.unregister_pickle_by_value(router_module)
        self.router: Any = kind(
            deployment_id=APP,
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
        )
        self.router.initialize_state()
        self.router.update_replicas(self.replicas)

    async def choose(self, *args: Any) -> list[str]:
        pending = Pending(list(args))
        ranks = await self.router.choose_replicas(self.replicas, pending)
        assert pending.routing_context.should_backoff, "Serve's loop would spin"
        return [replica.name for (replica,) in ranks]

    async def look(self, request: GenerateRequest) -> list[str]:
        """As Serve asks when it comes back for the same request: nothing is counted."""
        pending = Pending([request], RequestRoutingContext(should_backoff=True))
        ranks = await self.router.choose_replicas(self.replicas, pending)
        return [replica.name for (replica,) in ranks]

    async def send(self, request: GenerateRequest) -> str:
        """As Serve does; it is answered at once."""
        name = (await self.choose(request))[0]
        replica_id = MakeReplicaID(name, APP)
        self.router.on_send_request(replica_id)
        self.router.on_request_routed(Pending([request]), replica_id, None)
        self.router.decrement_queue_len_cache(replica_id)
        return name


def request(ids: list[int], session: str = "", avoid: tuple[str, ...] = ()) -> GenerateRequest:
    hint = RoutingHint(len(ids), marks(ids), session, avoid)
    return GenerateRequest("r", "m", tuple(ids), SamplingParams(), routing=hint)


def test_conversations_stay_where_they_began_and_spread() -> None:
    async def body() -> None:
        routed = Routed("a", "b", "c")
        homes: dict[int, set[str]] = {}
        for turn in range(1, 6):
            for conversation in range(12):
                where = await routed.send(request(prompt(conversation, 100 * turn)))
                homes.setdefault(conversation, set()).add(where)
        assert all(len(where) == 1 for where in homes.values()), homes
        counts = Counter(next(iter(where)) for where in homes.values())
        assert max(counts.values()) <= 6, counts
        assert len(counts) == 3

    asyncio.run(body())


def test_a_burst_spreads_although_nothing_has_been_sent_yet() -> None:
    async def body() -> None:
        routed = Routed("a", "b", "c")
        same = request(prompt(1, 200))
        counts = Counter([(await routed.choose(same))[0] for _ in range(12)])
        assert max(counts.values()) <= LOAD_RATIO * min(counts.values()) + LOAD_WINDOW + 1
        for name, count in counts.items():
            for _ in range(count):
                routed.router.on_send_request(MakeReplicaID(name, APP))
            assert routed.router.replica_queue_len_cache.get(MakeReplicaID(name, APP)) == count

    asyncio.run(body())


def test_ingresses_agree_on_conversations_that_they_share() -> None:
    async def body() -> None:
        ingresses = [Routed("a", "b", "c") for _ in range(2)]
        same = 0
        for i in range(200):
            first = await ingresses[i % 2].send(request(prompt(i, 100)))
            second = await ingresses[(i + 1) % 2].send(request(prompt(i, 180)))
            same += first == second
        assert same > 150

    asyncio.run(body())


def test_a_session_stays_although_its_prompts_have_nothing_in_common() -> None:
    async def body() -> None:
        routed = Routed("a", "b", "c")
        for session in range(9):
            homes = {
                await routed.send(request(prompt(100 * session + i, 60), f"s{session}"))
                for i in range(5)
            }
            assert len(homes) == 1

    asyncio.run(body())


def test_load_comes_from_serve_then_from_the_replica() -> None:
    async def body() -> None:
        routed = Routed("a", "b")
        sent = request(prompt(1, 200))
        home = await routed.send(sent)
        assert routed.router.placed == {sent.request_id: home}
        other = {"a": "b", "b": "a"}[home]
        for _ in range(LOAD_WINDOW + 1):
            routed.router.on_send_request(MakeReplicaID(home, APP))
        assert await routed.look(sent) == [other, home]
        routed.router.replica_queue_len_cache._cache.clear()
        assert await routed.look(sent) == [home, other]
        routed.router.replica_queue_len_cache._cache.clear()
        next(r for r in routed.replicas if r.name == home).routing_stats = {"requests": 20}
        assert await routed.look(sent) == [other, home]

    asyncio.run(body())


@pytest.mark.parametrize("stats", [None, {}, {"kv": None}, {"waiting": "many"}, 7])
def test_missing_or_strange_stats_are_no_error(stats: Any) -> None:
    async def body() -> None:
        routed = Routed("a", "b")
        for replica in routed.replicas:
            replica.routing_stats = stats
        for args in ((), (None,), ("describe",), (SimpleNamespace(routing=None),)):
            assert sorted(await routed.choose(*args)) == ["a", "b"]
        await routed.send(request(prompt(1, 100)))
        await routed.send(request([1, 2, 3]))
        assert await routed.router.choose_replicas([], None) == []
        assert len(await routed.router.choose_replicas(routed.replicas, None)) == 2

    asyncio.run(body())


def test_a_sleeping_replica_is_woken_only_when_the_others_are_busy() -> None:
    async def body() -> None:
        routed = Routed("a", "b")
        sent = request(prompt(1, 300))
        home = await routed.send(sent)
        other = {"a": "b", "b": "a"}[home]
        assert await routed.look(sent) == [home, other]
        next(r for r in routed.replicas if r.name == home).routing_stats = {"asleep": 1}
        assert await routed.look(sent) == [other, home]
        for _ in range(LOAD_WINDOW + 1):
            routed.router.on_send_request(MakeReplicaID(other, APP))
        assert await routed.look(sent) == [home, other]

    asyncio.run(body())


def test_refused_lost_and_gone_replicas() -> None:
    async def body() -> None:
        routed = Routed("a", "b")
        sent = request(prompt(1, 200))
        home = await routed.send(sent)
        other = {"a": "b", "b": "a"}[home]
        assert await routed.send(request(prompt(1, 200), avoid=(home,))) == other
        assert await routed.look(sent) == [other, home]  # the one that took it has it now
        routed.router.on_replica_actor_unavailable(MakeReplicaID(other, APP))
        assert await routed.look(sent) == [home, other]
        routed.router.on_new_queue_len_info(MakeReplicaID(other, APP), 0)
        assert await routed.look(sent) == [other, home]
        routed.replicas = [r for r in routed.replicas if r.name == home]
        routed.router.update_replicas(routed.replicas)
        assert await routed.look(sent) == [home]
        assert set(routed.router._memories) == {home}

    asyncio.run(body())
