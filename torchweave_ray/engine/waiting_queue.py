"""The engine's only queue: sequences that hold no blocks, each tenant's in one order."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator

from torchweave_ray.engine.sequence import Sequence

QueueKey = tuple[int, float, float, int]


class WaitingQueue:
    def __init__(self, ageing_tokens_per_step: int) -> None:
        self.num_tokens = 0
        """Tokens that the waiting sequences still have to compute, as far as is known."""
        self.num_remaining_tokens = 0
        """The same if the prefix cache had nothing."""
        self._ageing = ageing_tokens_per_step
        self._by_tenant: dict[str, list[Sequence]] = {}

    def queue_key(self, seq: Sequence) -> QueueKey:
        """Smallest first: priority, then fewest remaining tokens with ageing, then deadline.

        A sequence counts as `ageing` tokens shorter for each step since it arrived. All age
        alike, so adding ageing * arrival_step gives the same order and never changes.
        """
        request = seq.state.request
        aged = seq.num_remaining_tokens + self._ageing * seq.arrival_step
        return (-request.priority, aged, request.deadline or math.inf, seq.seq_id)

    def add(self, seq: Sequence, num_shared_tokens: int) -> None:
        seq.num_shared_tokens = num_shared_tokens
        own = self._by_tenant.setdefault(seq.state.request.tenant, [])
        bisect.insort(own, seq, key=self.queue_key)
        self.num_tokens += seq.num_missing_tokens
        self.num_remaining_tokens += seq.num_remaining_tokens

    def remove(self, seq: Sequence) -> None:
        own = self._by_tenant[seq.state.request.tenant]
        index = bisect.bisect_left(own, self.queue_key(seq), key=self.queue_key)
        assert own[index] is seq
        del own[index]
        if not own:
            del self._by_tenant[seq.state.request.tenant]
        self.num_tokens -= seq.num_missing_tokens
        self.num_remaining_tokens -= seq.num_remaining_tokens
        seq.num_shared_tokens = 0

    def note_shared(self, seq: Sequence, num_tokens: int) -> None:
        """So many tokens of it need not be computed, as things are."""
        self.num_tokens -= seq.num_missing_tokens
        seq.num_shared_tokens = num_tokens
        self.num_tokens += seq.num_missing_tokens

    def of(self, tenant: str) -> list[Sequence]:
        """First those that go first. Not to be changed."""
        return self._by_tenant.get(tenant, [])

    def __iter__(self) -> Iterator[Sequence]:
        """Tenant by tenant."""
        return itertools.chain.from_iterable(self._by_tenant.values())

    def __len__(self) -> int:
        return sum(map(len, self._by_tenant.values()))

    def check_integrity(self) -> None:
        assert self.num_tokens == sum(seq.num_missing_tokens for seq in self)
        assert self.num_remaining_tokens == sum(seq.num_remaining_tokens for seq in self)
        for seq in self:
            assert not seq.block_tables, f"sequence {seq.seq_id} waits with blocks"
