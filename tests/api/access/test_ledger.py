"""Several ingresses, one ledger: together they let in what one would, also while it is down."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments.access import accounts as module
from deployments.access.accounts import LedgeredAccounts
from deployments.access.ledger import SILENT_S, Grant, Ledger, Report
from torchweave_ray.api.access.key_file import ApiKey, digest_of
from torchweave_ray.errors import RateLimited

NUM = 4
"""Ingresses."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Line:
    """To a ledger that can be down; counts what it is asked."""

    def __init__(self, clock: Clock) -> None:
        self.ledger: Ledger | None = Ledger(clock)
        self.num_asked = 0

    async def lease(self, *args: Any) -> Grant:
        self.num_asked += 1
        await asyncio.sleep(0)
        if self.ledger is None:
            raise ConnectionError("nobody")
        return await self.ledger.lease(*args)

    async def report(self, ingress: str, report: Report) -> None:
        await asyncio.sleep(0)
        if self.ledger is None:
            raise ConnectionError("nobody")
        await self.ledger.report(ingress, report)


def key_of(**limits: int) -> ApiKey:
    return ApiKey(id="k", sha256=digest_of("k"), tenant="us", **limits)  # type: ignore[arg-type]


class Fleet:
    def __init__(self) -> None:
        self.clock = Clock()
        self.line = Line(self.clock)
        self.ingresses = [LedgeredAccounts(self.line, NUM, self.clock) for _ in range(NUM)]

    async def pass_s(self, seconds: float) -> None:
        """With time for every ingress to report."""
        self.clock.now += seconds
        for ingress in self.ingresses:
            ingress._has_news.set()
        for _ in range(20):
            await asyncio.sleep(0)


async def is_let_in(attempt: Awaitable[None]) -> bool:
    try:
        await attempt
    except RateLimited:
        return False
    return True


def run(scene: Callable[[Fleet], Awaitable[None]]) -> None:
    async def play() -> None:
        fleet = Fleet()
        try:
            await scene(fleet)
        finally:
            for ingress in fleet.ingresses:
                if ingress._reporting is not None:
                    ingress._reporting.cancel()

    asyncio.run(play())


@pytest.mark.parametrize("shares", [(1, 1, 1, 1), (97, 1, 1, 1), (1, 0, 0, 0)])
@pytest.mark.parametrize("limit", [7, 600, 6_000])
def test_requests_a_minute_hold_together(limit: int, shares: tuple[int, ...]) -> None:
    """However the calls are spread, within 5 %."""

    async def scene(fleet: Fleet) -> None:
        rng, key = random.Random(1), key_of(requests_per_minute=limit)
        num, minutes, steps = 0, 3, 60
        for _ in range(minutes * steps):
            for _ in range(2 * limit // steps + 1):
                ingress = rng.choices(fleet.ingresses, shares)[0]
                if await is_let_in(ingress.enter(key, True)):
                    num += 1
                    ingress.leave(key)
            await fleet.pass_s(60 / steps)
        expected = limit * (1 + minutes)  # a minute's worth was there at the start
        assert 0.95 * expected - 1 <= num <= 1.05 * expected
        if limit > 600:
            assert fleet.line.num_asked < num / 5, "most calls ask nobody"

    run(scene)


def test_tokens_a_minute_hold_together_whatever_calls_come_to() -> None:
    async def scene(fleet: Fleet) -> None:
        rng, key = random.Random(2), key_of(tokens_per_minute=30_000)
        spent = 0
        for _ in range(180):
            for _ in range(12):
                ingress = rng.choice(fleet.ingresses)
                reserved = rng.randint(50, 300)
                if await is_let_in(ingress.take_tokens(key, reserved)):
                    comes_to = rng.randint(10, 400)
                    ingress.spend_tokens(key, comes_to - reserved)
                    spent += comes_to
            await fleet.pass_s(1.0)
        assert 0.95 * 4 * 30_000 <= spent <= 1.05 * 4 * 30_000
        left = fleet.ingresses[0].left(key)["tokens"]
        assert left.limit == 30_000
        assert left.remaining < 3_000

    run(scene)


def test_every_refusal_says_when_there_is_room_again() -> None:
    """Also those that the ledger is not asked about."""

    async def scene(fleet: Fleet) -> None:
        key, ingress = key_of(requests_per_minute=6), fleet.ingresses[0]
        while await is_let_in(ingress.enter(key, True)):
            pass
        for waited in range(4):
            num_asked = fleet.line.num_asked
            with pytest.raises(RateLimited) as caught:
                await ingress.enter(key, True)
            assert fleet.line.num_asked == num_asked, "who floods it does not flood the ledger"
            assert caught.value.retry_after == pytest.approx(10 - 0.05 * waited, abs=0.01)
            fleet.clock.now += 0.05
        fleet.clock.now += 9.9
        await ingress.enter(key, True)

    run(scene)


@pytest.mark.parametrize("limit", [3, 200])
def test_calls_at_once_hold_together(limit: int) -> None:
    async def scene(fleet: Fleet) -> None:
        key = key_of(max_concurrent_requests=limit)
        open_at: list[LedgeredAccounts] = []
        for number in range(limit * 2):
            ingress = fleet.ingresses[number % NUM]
            if await is_let_in(ingress.enter(key, True)):
                open_at.append(ingress)
        assert limit * 0.95 - 1 <= len(open_at) <= limit
        for _ in range(limit // 2):
            open_at.pop().leave(key)
        await fleet.pass_s(0.3)
        num = 0
        while await is_let_in(fleet.ingresses[0].enter(key, True)):
            num += 1
        assert limit // 2 - limit * 0.05 <= num <= limit // 2 + 1

    run(scene)


def test_an_ingress_that_died_keeps_no_places() -> None:
    async def scene(fleet: Fleet) -> None:
        key, (dead, other, *_) = key_of(max_concurrent_requests=2), fleet.ingresses
        await dead.enter(key, True)
        await dead.enter(key, True)
        assert not await is_let_in(other.enter(key, True))
        assert dead._reporting is not None
        dead._reporting.cancel()
        await fleet.pass_s(SILENT_S + 1)
        assert await is_let_in(other.enter(key, True))

    run(scene)


def test_while_the_ledger_is_down_each_goes_by_its_part() -> None:
    async def scene(fleet: Fleet) -> None:
        key = key_of(requests_per_minute=400, max_concurrent_requests=8)
        await fleet.ingresses[0].enter(key, True)
        ledger, fleet.line.ledger = fleet.line.ledger, None
        let_in = [0] * NUM
        for index, ingress in enumerate(fleet.ingresses):
            for _ in range(300):
                if await is_let_in(ingress.enter(key, True)):
                    let_in[index] += 1
                    ingress.leave(key)
        parts = 400 / NUM
        assert all(parts * 0.9 <= each <= parts * 1.1 for each in let_in), let_in
        for ingress in fleet.ingresses[1:]:
            await fleet.pass_s(10)
            held = [await is_let_in(ingress.enter(key, True)) for _ in range(5)]
            assert held == [True, True, False, False, False], "its part of 8 places is 2"
            ingress.leave(key)
            ingress.leave(key)
        # Back, and empty as a new process is: places in use are known from the first reports on.
        assert ledger is not None
        fleet.line.ledger = Ledger(fleet.clock)
        await fleet.pass_s(module.DOWN_S + module.ALIVE_S + 0.1)
        opened = 0
        while await is_let_in(fleet.ingresses[3].enter(key, True)):
            opened += 1
        assert opened == 7, "one is still open at the first"

    run(scene)


def test_a_ledger_that_hangs_delays_one_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.02)

    async def scene(fleet: Fleet) -> None:
        async def hang(*_: Any) -> Grant:
            fleet.line.num_asked += 1
            await asyncio.sleep(3600)
            raise AssertionError

        fleet.line.lease = hang  # type: ignore[method-assign]
        key = key_of(requests_per_minute=400)
        for _ in range(20):
            assert await is_let_in(fleet.ingresses[0].enter(key, True))
        assert fleet.line.num_asked == 1

    run(scene)
