"""Shares of the engine among tenants that compete for it: who goes first, and who gives way.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
whoever has had the least service by his weight goes first. Within a tenant the order is the
queue's. A tenant that is alone costs nothing and waits for nobody. Knows no text and no tensors.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.engine.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from torchweave_ray.engine.scheduler import Scheduler

OUTPUT_COST = 2.0
"""Of a token of the output, where one of the prompt costs 1."""
CREDIT = 512.0
"""Service that a tenant may be behind the others by and still get."""


class Tenant:
    __slots__ = ("level", "num_open", "service", "weight")

    def __init__(self, service: float) -> None:
        self.service = service
        """Tokens, over its weight."""
        self.level = 0.0
        """What the least served had when it came: below that it has credit, which is no measure
        for others."""
        self.num_open = 0
        """Sequences that have not finished."""
        self.weight = 1.0


class FairShares:
    def __init__(self) -> None:
        self._tenants: dict[str, Tenant] = {}
        """Those with open sequences, and those that have had more than everybody who has some."""
        self._num_charged: dict[int, int] = {}
        """By seq_id: positions paid for; what is computed again is not paid twice."""

    @property
    def is_contended(self) -> bool:
        return len(self._tenants) > 1 and sum(t.num_open > 0 for t in self._tenants.values()) > 1

    def join(self, seq: Sequence) -> None:
        """Idle time earns a short prompt and no more: whoever comes back goes first with that much,
        for two prompts that take turns would both be late."""
        request = seq.state.request
        tenant = self._tenants.setdefault(request.tenant, Tenant(-math.inf))
        if not tenant.num_open:
            tenant.level = self._least()
            tenant.service = max(tenant.service, tenant.level - CREDIT)
        tenant.num_open += 1
        tenant.weight = request.weight

    def leave(self, seq: Sequence) -> None:
        self._num_charged.pop(seq.seq_id, None)
        self._tenants[seq.state.request.tenant].num_open -= 1
        self._forget()

    def charge(self, seq: Sequence, end: int) -> None:
        """Its positions up to `end` go into a step; so does the token that is drawn there."""
        if len(self._tenants) == 1:
            return
        end += end == len(seq.token_ids)
        start = self._num_charged.get(seq.seq_id, seq.num_computed_tokens)
        if end <= start:
            return
        self._num_charged[seq.seq_id] = end
        num_output = max(0, end - max(start, seq.num_prompt_tokens))
        request = seq.state.request
        cost = end - start + (OUTPUT_COST - 1.0) * num_output
        self._tenants[request.tenant].service += cost / request.weight

    def order(self, begun: list[Sequence], waiting: WaitingQueue) -> Iterator[Sequence]:
        """Prompts begun, and those that wait. Charge what each gets before asking for the next."""
        key = waiting.queue_key
        if not self.is_contended:
            yield from heapq.merge(sorted(begun, key=key), list(waiting), key=key)
            return
        begun_by: dict[str, list[Sequence]] = {}
        for seq in begun:
            begun_by.setdefault(seq.state.request.tenant, []).append(seq)
        turns = {
            name: heapq.merge(
                sorted(begun_by.get(name, ()), key=key), list(waiting.of(name)), key=key
            )
            for name in self._tenants
        }
        while turns:
            name = min(turns, key=lambda name: self._tenants[name].service)
            first = next(turns[name], None)
            if first is None:
                del turns[name]
            else:
                yield first

    def share(self, name: str, weight: float) -> float:
        """Of the engine, for a tenant that has something open or is about to."""
        others = sum(
            tenant.weight
            for each, tenant in self._tenants.items()
            if tenant.num_open and each != name
        )
        return weight / (weight + others)

    def make_room(self, scheduler: Scheduler) -> None:
        """Before a step: preempt sequences of tenants beyond their shares of slots or blocks, for
        waiting ones that stay within theirs and have had no more service."""
        if not self.is_contended or not scheduler.waiting:
            return
        for name in sorted(self._tenants, key=lambda name: self._tenants[name].service):
            room = _Room(scheduler, name)
            service, weight = self._tenants[name].service, self._tenants[name].weight
            for seq in list(scheduler.waiting.of(name)):
                if seq.has_token_in_flight:
                    continue
                share = self.share(name, weight)
                while (victim := room.victim(seq, share, self._beyond(name, service))) is not None:
                    scheduler.preempt(victim)
                if not room.take(seq):
                    break
                service += seq.num_remaining_tokens / weight

    def _beyond(self, name: str, service: float) -> Callable[[str], float]:
        """The share of each tenant that may have to give way to one with so much service."""

        def share(other: str) -> float:
            tenant = self._tenants[other]
            has_had_more = other != name and tenant.service >= service
            return self.share(other, tenant.weight) if has_had_more else 1.0

        return share

    def _least(self) -> float:
        tenants = self._tenants.values()
        return min((max(t.service, t.level) for t in tenants if t.num_open), default=0.0)

    def _forget(self) -> None:
        """Nobody open: no debts. Else whoever is gone and would come back with all the credit."""
        if not any(tenant.num_open for tenant in self._tenants.values()):
            self._tenants.clear()
        elif len(self._tenants) > 1:
            least = self._least()
            for name in [n for n, t in self._tenants.items() if not t.num_open]:
                if self._tenants[name].service <= least - CREDIT:
                    del self._tenants[name]


class _Room:
    """What a tenant's waiting sequences need, in the order of its queue, and what there is."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self._scheduler = scheduler
        self._name = name
        self._num_wanted = 0
        self._num_tokens = 0

    def victim(
        self, seq: Sequence, share: float, share_of: Callable[[str], float]
    ) -> Sequence | None:
        """Whoever is the next to make room for `seq`; None: there is room, or nobody has to."""
        scheduler = self._scheduler
        running = scheduler.running
        most = scheduler.config.max_num_seqs
        if len(running) + self._num_wanted + 1 > most:
            return _victim(running, self._name, self._num_wanted + 1, share, share_of, most, _slot)
        if self._num_wanted:
            return None  # memory is made for the first only: the next step sees what is left
        blocks = scheduler.blocks
        prefix = blocks.shared_prefix(seq)
        needed = blocks.num_blocks_taken(prefix, len(seq.token_ids))
        there = blocks.num_admissible_blocks(running) + blocks.num_fenced_blocks
        if needed <= there:
            return None
        most = blocks.num_blocks
        return _victim(running, self._name, needed, share, share_of, most, blocks.num_held)

    def take(self, seq: Sequence) -> bool:
        """Count it in, if it may begin in this step; False: nor may any behind it."""
        is_full = len(self._scheduler.running) + self._num_wanted >= (
            self._scheduler.config.max_num_seqs
        )
        self._num_wanted += 1
        self._num_tokens += seq.num_remaining_tokens
        return not is_full and self._num_tokens < self._scheduler.config.step_tokens


def _victim(
    running: Iterable[Sequence],
    name: str,
    wanted: float,
    share: float,
    share_of: Callable[[str], float],
    total: float,
    amount: Callable[[Sequence], int],
) -> Sequence | None:
    """The most junior sequence of the tenant that is furthest beyond its share of `total`."""
    held: Counter[str] = Counter()
    for seq in running:
        held[seq.state.request.tenant] += amount(seq)
    if held[name] + wanted > share * total:
        return None
    excess = {other: held[other] - share_of(other) * total for other in held}
    other = max(excess, key=lambda each: excess[each], default="")
    if excess.get(other, 0.0) <= 0.0:
        return None
    own = (seq for seq in running if seq.state.request.tenant == other)
    return max(own, key=lambda seq: seq.seniority)


def _slot(seq: Sequence) -> int:
    return 1
