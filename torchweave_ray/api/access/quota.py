"""What a key has left: requests and tokens a minute, and requests at once.

Buckets that fill evenly: a key that has rested may use a minute's worth at once. What an answer
comes to is known at its end only, so a token bucket may go below zero; nothing more is let in until
it is filled again, and over minutes the limit holds. Knows no HTTP and no Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torchweave_ray.api.access.key_file import ApiKey
from torchweave_ray.errors import RateLimited

SLOT_RETRY_S = 1.0
"""When to ask again for one of the places that are all taken: nobody knows when one comes free."""


class Bucket:
    """`limit` units a minute, of which at most a minute's worth is kept."""

    __slots__ = ("_clock", "_level", "_then", "limit")

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.limit = self._level = float(limit)
        self._then = clock()

    @property
    def level(self) -> float:
        """Below zero: spent in advance."""
        now = self._clock()
        self._level = min(self.limit, self._level + (now - self._then) * self.limit / 60)
        self._then = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Until so much may be taken; more than the bucket holds needs it full."""
        return max(0.0, (min(amount, self.limit) - self.level) * 60 / self.limit)

    def take(self, amount: float) -> float:
        """Takes it and returns 0, or takes nothing and returns the seconds to wait."""
        seconds = self.wait_s(amount)
        if seconds <= 0:
            self._level -= amount
        return max(0.0, seconds)

    def spend(self, amount: float) -> None:
        """Whatever there is; a negative amount is given back."""
        self._level = min(self.limit, self.level - amount)

    def set_limit(self, limit: float) -> None:
        """What is missing stays missing."""
        self._level = self.level + limit - self.limit
        self.limit = limit


@dataclass(frozen=True, slots=True)
class Left:
    """Of one kind, as the headers say it."""

    limit: int
    remaining: int
    reset_s: float
    """Until all of it is there again."""


class Accounts(Protocol):
    """Of all keys; `Ledgered` accounts share limits with other processes."""

    async def enter(self, key: ApiKey, is_new: bool) -> None:
        """A call begins; not `is_new`: it goes on with one that was counted. RateLimited if not."""
        ...

    def leave(self, key: ApiKey) -> None: ...

    async def take_tokens(self, key: ApiKey, num_tokens: int) -> None:
        """Raises RateLimited when there is no room for so many."""
        ...

    def spend_tokens(self, key: ApiKey, num_tokens: int) -> None:
        """Beyond what was taken; below zero: of it was not needed."""
        ...

    def left(self, key: ApiKey) -> dict[str, Left]:
        """Of "requests" and "tokens", where they are limited."""
        ...


class Account:
    """One key's."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.num_open = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.set_limits(key)

    def set_limits(self, key: ApiKey) -> None:
        self.key = key
        self.requests = self._bucket(self.requests, key.requests_per_minute)
        self.tokens = self._bucket(self.tokens, key.tokens_per_minute)

    def _bucket(self, bucket: Bucket | None, limit: int | None) -> Bucket | None:
        if limit is None or bucket is None:
            return None if limit is None else Bucket(limit, self._clock)
        bucket.set_limit(limit)
        return bucket


class LocalAccounts:
    """`Accounts` of one process that has the limits for itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_id: dict[str, Account] = {}

    async def enter(self, key: ApiKey, is_new: bool) -> None:
        account = self._account(key)
        most = key.max_concurrent_requests
        if most is not None and account.num_open >= most:
            raise too_many_open(most)
        if is_new and account.requests is not None and (wait_s := account.requests.take(1)):
            raise too_many("requests", account.requests.limit, 1, wait_s)
        account.num_open += 1

    def leave(self, key: ApiKey) -> None:
        self._account(key).num_open -= 1

    async def take_tokens(self, key: ApiKey, num_tokens: int) -> None:
        bucket = self._account(key).tokens
        if bucket is not None and (wait_s := bucket.take(num_tokens)):
            raise too_many("tokens", bucket.limit, num_tokens, wait_s)

    def spend_tokens(self, key: ApiKey, num_tokens: int) -> None:
        bucket = self._account(key).tokens
        if bucket is not None:
            bucket.spend(num_tokens)

    def left(self, key: ApiKey) -> dict[str, Left]:
        account = self._account(key)
        buckets = {"requests": account.requests, "tokens": account.tokens}
        return {kind: left_of(bucket) for kind, bucket in buckets.items() if bucket is not None}

    def _account(self, key: ApiKey) -> Account:
        account = self._by_id.get(key.id)
        if account is None:
            account = self._by_id[key.id] = Account(key, self._clock)
        elif account.key is not key:  # its file was read again
            account.set_limits(key)
        return account


def left_of(bucket: Bucket) -> Left:
    level = bucket.level
    reset_s = (bucket.limit - level) * 60 / bucket.limit
    return Left(int(bucket.limit), max(0, math.floor(level)), reset_s)


def too_many(kind: str, limit: float, wanted: int, wait_s: float) -> RateLimited:
    return RateLimited(
        f"this key's limit is {limit:g} {kind} a minute, and this call needs {wanted}; "
        f"try again in {wait_s:.1f} s",
        None,
        "rate_limit_exceeded",
        wait_s,
    )


def too_many_open(most: int) -> RateLimited:
    return RateLimited(
        f"this key may have {most} requests open at once, and has them",
        None,
        "concurrency_limit_exceeded",
        SLOT_RETRY_S,
    )
