"""What a flood of one tenant adds to another's first tokens, in the time that SmolLM2's tuned costs
say: deterministic, where scripts/limits/fair_shares.py measures."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from itertools import count

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer
from torchweave_ray.config import CacheConfig, SchedulerConfig, StepCost
from torchweave_ray.engine.budget import work_ms
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import PendingStep, RuntimeLimits, StepPlan
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams

COST = StepCost(a=7.9, b=0.59, c=0.00063)
"""Milliseconds, of SmolLM2-135M in bfloat16 on two cores."""
CONFIG = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=128, step_cost=COST)
LIMITS = RuntimeLimits(4096, 16, 2048, VOCAB, (EOS,))
SHARE, MARGIN = 0.5, 0.2
GUESTS, INTERVAL_S = 40, 1.0


@dataclass
class TimedRunner(EchoRunner):
    """A step takes what it is predicted to."""

    now: float = 0.0
    step_s: float = field(default=0.0, init=False)

    def submit(self, plan: StepPlan) -> PendingStep:
        work = sum(work_ms(COST, e.start, e.num_tokens) for e in plan.sequences)
        self.step_s = (COST.a + work) / 1e3
        self.now += self.step_s
        return super().submit(plan)


def request(name: str, tenant: str, rng: random.Random, num_output: int) -> GenerateRequest:
    prompt = tuple(rng.randrange(1, VOCAB) for _ in range(256))
    sampling = SamplingParams(max_tokens=num_output, ignore_eos=True, seed=1)
    return GenerateRequest(name, "", prompt, sampling, tenant=tenant)


def first_tokens_s(flood: int, tenant: str) -> list[float]:
    """Seconds of each guest's, beside so many requests of the tenant that are always open."""
    rng = random.Random(1)
    runner = TimedRunner(LIMITS)
    cache = CacheConfig(enable_prefix_caching=False)
    engine = Engine(runner, LetterDetokenizer(), cache, CONFIG, "artifact", lambda: runner.now)
    numbers = count()
    flooding: set[str] = set()
    arrived: dict[str, float] = {}
    found: list[float] = []
    due = 3.0
    while len(found) < GUESTS:
        while len(flooding) < flood:
            name = f"flood{next(numbers)}"
            flooding.add(name)
            engine.add(request(name, tenant, rng, 128))
        if due <= runner.now and len(found) + len(arrived) < GUESTS:
            name = f"guest{next(numbers)}"
            arrived[name] = due
            engine.add(request(name, "guest", rng, 16))
            due += INTERVAL_S * rng.uniform(0.5, 1.5)
        if not engine.has_work:
            runner.now = max(runner.now, due)
            continue
        for output in engine.step():
            if output.request_id in arrived:
                found.append(runner.now - arrived.pop(output.request_id))
            elif output.is_last:
                flooding.discard(output.request_id)
    return found


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


@pytest.mark.parametrize("flood", [4, 64])
def test_another_tenants_flood_adds_no_more_than_its_share_says(flood: int) -> None:
    alone = p95(first_tokens_s(0, ""))
    shared = p95(first_tokens_s(flood, "flooder"))
    assert shared <= alone * (1 / SHARE + MARGIN), (alone, shared)


def test_a_flood_of_ones_own_is_waited_for() -> None:
    """Without a difference this would show nothing."""
    assert p95(first_tokens_s(64, "guest")) > 5 * p95(first_tokens_s(64, "flooder"))
