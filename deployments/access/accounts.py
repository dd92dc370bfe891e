"""`LedgeredAccounts`: limits of keys that several ingresses share, leased from one ledger.

While the ledger does not answer, each ingress goes by its own part of every limit, so that all
together stay within it. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from deployments.access.ledger import Grant, Report
from torchweave_ray.api.access.key_file import ApiKey
from torchweave_ray.api.access.quota import Bucket, Left, too_many, too_many_open

logger = logging.getLogger(__name__)

SPARE_SHARE = 0.05
"""Of a limit: what all ingresses together may hold without need, and so the error of the limit."""
REPORT_S = 0.25
ALIVE_S = 2.0
"""An ingress that holds places says so at least this often."""
ANSWER_S = 0.5
"""A ledger that takes longer is down, and is not asked for `DOWN_S`."""
DOWN_S = 1.0


class LedgerHandle(Protocol):
    async def lease(
        self, ingress: str, key: str, kind: str, limit: int, need: float, spare: float
    ) -> Grant: ...

    async def report(self, ingress: str, report: Report) -> None: ...


class _Remote:
    """A `LedgerHandle` of a deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def lease(self, *args: Any) -> Grant:
        grant = await self._handle.lease.remote(*args)
        assert isinstance(grant, Grant)
        return grant

    async def report(self, ingress: str, report: Report) -> None:
        await self._handle.report.remote(ingress, report)


def accounts_of(ledger: DeploymentHandle[Any], num_ingresses: int) -> LedgeredAccounts:
    return LedgeredAccounts(_Remote(ledger), num_ingresses)


@dataclass(slots=True)
class _Lease:
    """Of one kind, of one key."""

    kind: str
    limit: int
    held: float = 0.0
    """Leased and not used; below zero: used without a lease."""
    level: float = 0.0
    """What the ledger had left, when it was last asked."""
    level_at: float = 0.0
    refused_until: float = float("-inf")
    """Before that nobody is asked again: who floods an ingress shall not flood the ledger."""
    room_at: float = 0.0
    """When there may be enough, by what the ledger said then."""
    own: Bucket | None = None
    """Of this ingress alone, while the ledger is down."""


@dataclass(slots=True)
class _Account:
    key: ApiKey
    leases: dict[str, _Lease] = field(default_factory=dict)
    num_open: int = 0


class LedgeredAccounts:
    """`Accounts` of one of several processes."""

    def __init__(
        self,
        ledger: LedgerHandle,
        num_ingresses: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._num_ingresses = num_ingresses
        self._clock = clock
        self._name = uuid.uuid4().hex
        self._accounts: dict[str, _Account] = {}
        self._turn = asyncio.Lock()  # what the ledger hears is in order
        self._has_news = asyncio.Event()
        self._down_until = float("-inf")
        self._reporting: asyncio.Task[None] | None = None

    async def enter(self, key: ApiKey, is_new: bool) -> None:
        if self._reporting is None:
            self._reporting = asyncio.create_task(self._report_for_ever())
        account = self._account(key)
        slots = account.leases.get("slots")
        if slots is not None and await self._take(account, slots, 1):
            raise too_many_open(slots.limit)
        account.num_open += 1
        requests = account.leases.get("requests")
        if is_new and requests is not None and (wait_s := await self._take(account, requests, 1)):
            self.leave(key)
            raise too_many("requests", requests.limit, 1, wait_s)

    def leave(self, key: ApiKey) -> None:
        account = self._account(key)
        account.num_open -= 1
        if (slots := account.leases.get("slots")) is not None:
            slots.held += 1
            self._has_news.set()

    async def take_tokens(self, key: ApiKey, num_tokens: int) -> None:
        account = self._account(key)
        lease = account.leases.get("tokens")
        if lease is not None and (wait_s := await self._take(account, lease, num_tokens)):
            raise too_many("tokens", lease.limit, num_tokens, wait_s)

    def spend_tokens(self, key: ApiKey, num_tokens: int) -> None:
        lease = self._account(key).leases.get("tokens")
        if lease is not None:
            lease.held -= num_tokens

    def left(self, key: ApiKey) -> dict[str, Left]:
        """As far as is known here."""
        found = {}
        for kind, lease in self._account(key).leases.items():
            if kind != "slots":
                grown = (self._clock() - lease.level_at) * lease.limit / 60
                level = min(lease.limit, lease.level + grown + lease.held)
                reset_s = (lease.limit - level) * 60 / lease.limit
                found[kind] = Left(lease.limit, max(0, math.floor(level)), reset_s)
        return found

    async def _take(self, account: _Account, lease: _Lease, amount: float) -> float:
        """0, or the seconds until it may be asked for again."""
        if lease.held >= amount:
            lease.held -= amount
            return 0.0
        if (now := self._clock()) < lease.refused_until:
            return lease.room_at - now
        async with self._turn:
            need = amount - lease.held
            if need <= 0:
                lease.held -= amount
                return 0.0
            if self._clock() < self._down_until:
                return self._take_own(account, lease, amount)
            try:
                async with asyncio.timeout(ANSWER_S):
                    grant = await self._ledger.lease(
                        self._name,
                        account.key.id,
                        lease.kind,
                        lease.limit,
                        need,
                        self._spare(lease),
                    )
            except Exception as error:  # whatever it is, nobody answers
                self._note_down(error)
                return self._take_own(account, lease, amount)
            lease.level, lease.level_at = grant.level, self._clock()
            if grant.amount:
                lease.held += grant.amount - amount
            else:
                lease.room_at = self._clock() + grant.wait_s
                lease.refused_until = min(lease.room_at, self._clock() + REPORT_S)
            return 0.0 if grant.amount else grant.wait_s

    def _take_own(self, account: _Account, lease: _Lease, amount: float) -> float:
        """Of this ingress's part of the limit."""
        share = lease.limit / self._num_ingresses
        if lease.kind == "slots":
            if account.num_open >= max(1, int(share)):
                return 1.0
            lease.held -= amount  # the ledger hears of it once it is back
            return 0.0
        if lease.own is None:
            lease.own = Bucket(share, self._clock)
        return lease.own.take(amount)

    async def _report_for_ever(self) -> None:
        last_at = float("-inf")
        while True:
            try:
                async with asyncio.timeout(REPORT_S):
                    await self._has_news.wait()
            except TimeoutError:
                pass
            self._has_news.clear()
            async with self._turn:
                returned = self._excess()
                is_due = any(returned.values()) or self._clock() - last_at > ALIVE_S
                if not is_due or self._clock() < self._down_until:
                    continue
                try:
                    async with asyncio.timeout(ANSWER_S):
                        await self._ledger.report(self._name, self._news(returned))
                except Exception as error:
                    self._note_down(error)
                    continue
                last_at = self._clock()
                for (key_id, kind), amount in returned.items():
                    self._accounts[key_id].leases[kind].held -= amount

    def _excess(self) -> dict[tuple[str, str], float]:
        """What is held beyond the spare, or was used without a lease."""
        found = {}
        for account in self._accounts.values():
            for lease in account.leases.values():
                excess = min(lease.held, 0.0) or max(0.0, lease.held - self._spare(lease))
                if excess:
                    found[account.key.id, lease.kind] = excess
        return found

    def _news(self, returned: dict[tuple[str, str], float]) -> Report:
        slots = {
            name: account.num_open + int(max(0.0, lease.held - returned.get((name, "slots"), 0.0)))
            for name, account in self._accounts.items()
            if (lease := account.leases.get("slots")) is not None
        }
        return Report({each: n for each, n in returned.items() if each[1] != "slots"}, slots)

    def _spare(self, lease: _Lease) -> float:
        spare = lease.limit * SPARE_SHARE / self._num_ingresses
        return spare if lease.kind == "tokens" else int(spare)

    def _note_down(self, error: Exception) -> None:
        if self._clock() >= self._down_until:
            why = str(error) or type(error).__name__
            logger.warning("[Keys] the ledger does not answer, limits are this ingress's: %s", why)
        self._down_until = self._clock() + DOWN_S

    def _account(self, key: ApiKey) -> _Account:
        account = self._accounts.get(key.id)
        if account is None:
            account = self._accounts[key.id] = _Account(key)
        elif account.key is key:
            return account
        account.key = key
        limits = {
            "slots": key.max_concurrent_requests,
            "requests": key.requests_per_minute,
            "tokens": key.tokens_per_minute,
        }
        for kind, limit in limits.items():
            if limit is None:
                account.leases.pop(kind, None)
            else:
                lease = account.leases.setdefault(kind, _Lease(kind, limit, 0.0, float(limit)))
                if lease.limit != limit:
                    lease.limit, lease.own, lease.refused_until = limit, None, float("-inf")
        return account
