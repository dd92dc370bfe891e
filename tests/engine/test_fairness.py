"""Tenants that compete share the engine by weight, and one that is alone notices nothing."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.echo import EOS, VOCAB
from tests.engine.test_scheduler import make_engine, make_request, run, steps_to_first_token
from tests.properties.test_engine_properties import Workload
from torchweave_ray.config import CacheConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.fairness import CREDIT, OUTPUT_COST, FairShares
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.engine.waiting_queue import WaitingQueue
from torchweave_ray.errors import Overloaded
from torchweave_ray.outputs import GenerateRequest

LIMITS = RuntimeLimits(1024, 16, 8192, VOCAB, (EOS,))
NO_CACHE = CacheConfig(enable_prefix_caching=False)
"""What the cache has is no service, and `Served` would count it."""


class Served:
    """What each tenant got, as its clients see it: prompts at their first tokens, and tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.service: Counter[str] = Counter()
        self.requests: dict[str, GenerateRequest] = {}
        self.num_waiting: Counter[str] = Counter()

    def add(self, request: GenerateRequest) -> None:
        self.requests[request.request_id] = request
        self.num_waiting[request.tenant] += 1
        self.engine.add(request)

    def step(self) -> list[str]:
        """Requests that had their first token."""
        begun = []
        for output in self.engine.step():
            request = self.requests[output.request_id]
            for delta in output.deltas:
                if delta.first_index == 0 and delta.token_ids:
                    begun.append(request.request_id)
                    self.num_waiting[request.tenant] -= 1
                    self.service[request.tenant] += len(request.prompt_token_ids)
                self.service[request.tenant] += OUTPUT_COST * len(delta.token_ids)
        self.engine.check_integrity()
        return begun


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.tuples(st.sampled_from([1.0, 2.0, 5.0]), st.sampled_from([1.0, 3.0])),
    slots=st.integers(2, 12),
    num_blocks=st.sampled_from([60, 200, 2000]),
    step_depth=st.integers(0, 1),
)
def test_backlogged_tenants_get_service_by_weight(
    seed: int, weights: tuple[float, float], slots: int, num_blocks: int, step_depth: int
) -> None:
    """Theorem 4.4 of the paper: apart by no more than a bound that does not grow with time."""
    rng = random.Random(seed)
    limits = RuntimeLimits(num_blocks, 16, 400, VOCAB, (EOS,), step_depth=step_depth)
    engine, _ = make_engine(limits, NO_CACHE, max_num_seqs=slots, max_num_batched_tokens=slots + 64)
    served = Served(engine)
    shapes = [(rng.randint(1, 200), rng.randint(1, 60)) for _ in weights]
    num_added = 0
    for _ in range(600):
        for index, weight in enumerate(weights):
            while served.num_waiting[f"t{index}"] < slots:
                num_added += 1
                longest_prompt, longest_output = shapes[index]
                served.add(
                    make_request(
                        f"r{num_added}",
                        rng.randint(1, longest_prompt),
                        rng.randint(1, longest_output),
                        tenant=f"t{index}",
                        weight=weight,
                    )
                )
        served.step()
    per_weight = [served.service[f"t{i}"] / weight for i, weight in enumerate(weights)]
    longest = max(prompt + OUTPUT_COST * output for prompt, output in shapes)
    assert abs(per_weight[0] - per_weight[1]) <= 2 * longest / min(weights)


def plain_order(
    shares: FairShares, begun: list[Sequence], waiting: WaitingQueue
) -> Iterator[Sequence]:
    """As it was before there were tenants."""
    key = waiting.queue_key
    return heapq.merge(sorted(begun, key=key), sorted(waiting, key=key), key=key)


def test_one_tenant_has_the_plans_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def plans(seed: int) -> list[object]:
        workload = Workload(seed)
        for index, request in enumerate(workload.requests):
            workload.requests[index] = GenerateRequest(
                **{f: getattr(request, f) for f in request.__dataclass_fields__} | {"tenant": "t"}
            )
        workload.run()
        return [
            [(s.seq_id, s.start, s.num_tokens, s.draft_token_ids) for s in plan.sequences]
            for plan in workload.runner.plans
        ]

    with_shares = [plans(seed) for seed in range(150)]
    monkeypatch.setattr(FairShares, "order", plain_order)
    for name in ("join", "leave", "charge", "make_room"):
        monkeypatch.setattr(FairShares, name, lambda *_: None)
    assert [plans(seed) for seed in range(150)] == with_shares


@pytest.mark.parametrize("step_depth", [0, 1])
@pytest.mark.parametrize("scarce", ["slots", "blocks"])
def test_a_tenant_that_holds_everything_gives_way(scarce: str, step_depth: int) -> None:
    """Its streams are put back, not cut: their texts are what they are alone."""
    num_blocks = 64 if scarce == "blocks" else 1024
    limits = RuntimeLimits(num_blocks, 16, 1024, VOCAB, (EOS,), step_depth=step_depth)
    slots = 4 if scarce == "slots" else 32
    engine, _ = make_engine(limits, max_num_seqs=slots, max_num_batched_tokens=512)
    greedy = [make_request(f"a{i}", 200, 300, tenant="a") for i in range(4)]
    for request in greedy:
        engine.add(request)
    for _ in range(20):
        engine.step()
    # As much as there is, and not more than half of it.
    num_prompt = 100 if scarce == "slots" else 400
    engine.add(make_request("b", num_prompt, 4, tenant="b"))
    assert steps_to_first_token(engine, "b") <= 3 + step_depth
    assert 0 < engine.stats().num_preemptions <= 2
    outputs = run(engine)
    assert {reason_of(outputs[request.request_id]) for request in greedy} == {"length"}


def reason_of(outputs) -> str:
    return str(outputs[-1].deltas[-1].finish_reason)


def test_alone_a_tenant_has_every_slot() -> None:
    engine, runner = make_engine(max_num_seqs=8, max_num_batched_tokens=512)
    engine.add(make_request("b", 10, 2, tenant="b"))
    for i in range(8):
        engine.add(make_request(f"a{i}", 10, 50, tenant="a"))
    run(engine)
    assert max(len(plan.sequences) for plan in runner.plans) == 8
    assert engine.stats().num_preemptions == 0


def test_a_flood_does_not_keep_another_tenant_waiting() -> None:
    """Unloaded its 100 tokens take one step; behind the flood at most two more: the one that runs,
    and one whose budget it shares."""
    engine, _ = make_engine(LIMITS, NO_CACHE, max_num_seqs=16, max_num_batched_tokens=128)
    for i in range(60):
        engine.add(make_request(f"flood{i}", 500, 50, tenant="a"))
    for turn in range(10):
        engine.step()
        engine.add(make_request(f"b{turn}", 100, 3, tenant="b"))
        assert steps_to_first_token(engine, f"b{turn}") <= 3


def test_who_asks_one_by_one_has_no_more_than_his_share() -> None:
    """A tenant whose requests come one after the other, each a long prompt, owes what he had."""
    engine, _ = make_engine(LIMITS, NO_CACHE, max_num_seqs=4, max_num_batched_tokens=64)
    served = Served(engine)
    for i in range(100):
        served.add(make_request(f"a{i}", 300, 2, tenant="a"))
    number = 0
    served.add(make_request("b0", 600, 1, tenant="b"))
    while served.num_waiting["a"] > 10:
        served.step()
        if not served.num_waiting["b"]:
            number += 1
            served.add(make_request(f"b{number}", 600, 1, tenant="b"))
    assert served.service["b"] <= served.service["a"] * 1.1 + 1000
    assert served.service["b"] >= served.service["a"] * 0.6, "and not much less either"


def test_rest_earns_a_short_prompt_and_no_more() -> None:
    engine, _ = make_engine(LIMITS, NO_CACHE, max_num_seqs=4, max_num_batched_tokens=64)
    served = Served(engine)
    for i in range(60):
        served.add(make_request(f"a{i}", 100, 20, tenant="a"))
    for _ in range(100):
        served.step()  # b rests all the while
    before = served.service["a"]
    for i in range(60):
        served.add(make_request(f"b{i}", 100, 20, tenant="b"))
    for _ in range(60):
        served.step()
    lead = served.service["b"] - (served.service["a"] - before)
    assert -100 < lead < CREDIT + 200, "beside what is begun and not yet counted"


def test_priority_counts_among_ones_own() -> None:
    engine, _ = make_engine(LIMITS, NO_CACHE, max_num_seqs=2, max_num_batched_tokens=32)
    served = Served(engine)
    for i in range(20):
        served.add(make_request(f"a{i}", 50, 2, tenant="a", priority=9))
        served.add(make_request(f"b{i}", 50, 2, tenant="b", priority=i))
    order = [name for _ in range(40) for name in served.step()]
    assert abs(sum(name[0] == "a" for name in order) - len(order) / 2) <= 2
    of_b = [int(name[1:]) for name in order if name[0] == "b"]
    assert of_b == sorted(of_b, reverse=True)


def test_a_flood_fills_the_backlog_for_its_own_tenant_only() -> None:
    engine, _ = make_engine(LIMITS, NO_CACHE, max_num_seqs=2, max_waiting_tokens=1000)
    engine.add(make_request("a0", 900, tenant="a"), is_bounded=True)
    with pytest.raises(Overloaded):
        engine.add(make_request("a1", 200, tenant="a"), is_bounded=True)
    engine.add(make_request("b0", 400, tenant="b"), is_bounded=True)
    with pytest.raises(Overloaded):
        engine.add(make_request("b1", 200, tenant="b"), is_bounded=True)
    engine.add(make_request("c0", 2000, tenant="c"), is_bounded=True)
    assert set(run(engine)) == {"a0", "b0", "c0"}


def test_nothing_is_remembered_of_an_idle_engine() -> None:
    engine, _ = make_engine(cache=CacheConfig(enable_prefix_caching=False), max_num_seqs=4)
    for i in range(30):
        engine.add(make_request(f"r{i}", 30, 5, tenant=f"t{i}"))
    run(engine)
    shares = engine._scheduler.shares
    assert not shares._tenants
    assert not shares._num_charged
