"""Block tables of sequences: prefix match, sharing, growth, release behind the step's fence.

Knows blocks and sequences, not steps' budgets or who goes first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from torchweave_ray.block_hash import BlockHash, group_hash, next_hash
from torchweave_ray.config import CacheConfig
from torchweave_ray.engine.block_pool import BlockPool
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.outputs import OutputKind


@dataclass(frozen=True, slots=True)
class Prefix:
    """Blocks that hold a sequence's start already, not acquired yet."""

    num_blocks: int = 0
    """Of each table."""
    num_dropped: int = 0
    """Of these in sliding groups: the first ones, which are not there."""
    tables: tuple[list[int], ...] = ()
    partial: tuple[int, ...] = ()
    """One of each group, to be copied: a fork's source has more than full blocks."""


class BlockManager:
    def __init__(self, limits: RuntimeLimits, cache: CacheConfig) -> None:
        self.block_size = limits.block_size
        self._groups = limits.groups
        self._enable_prefix_caching = cache.enable_prefix_caching
        self._watermark_blocks = int(limits.num_blocks * cache.watermark)
        self._pool = BlockPool(limits.num_blocks)
        self._fenced: deque[tuple[int, list[int]]] = deque()

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_cacheable_tokens(self) -> int:
        return self._pool.num_blocks // self._groups.num * self.block_size

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_spare_blocks(self) -> int:
        """Free beyond the watermark."""
        return max(0, self._pool.num_free - self._watermark_blocks)

    @property
    def num_published(self) -> int:
        """Grows with every block that becomes cached."""
        return self._pool.num_committed

    @property
    def num_fenced_blocks(self) -> int:
        """Released, but a step in flight still writes to them."""
        return sum(len(blocks) for _, blocks in self._fenced)

    def num_positions(self, seq: Sequence) -> int:
        """That its tables have room for."""
        return _length(seq) * self.block_size

    def num_held(self, seq: Sequence) -> int:
        """Blocks of all groups."""
        return self._groups.num * _length(seq) - self._groups.num_sliding * seq.num_dropped_blocks

    def num_missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that its tables lack for `num_tokens` positions."""
        return self._groups.num * max(0, self._num_blocks_for(num_tokens) - _length(seq))

    def shared_prefix(self, seq: Sequence) -> Prefix:
        """At least one token is left to compute: its logits are wanted."""
        if not self._may_share(seq):
            return Prefix()
        return self._of_fork_source(seq) or self._cached_prefix(seq)

    def num_shared_tokens(self, seq: Sequence) -> int:
        """Tokens that `shared_prefix` saves it from computing."""
        if not self._may_share(seq):
            return 0
        if self._of_fork_source(seq) is not None:
            return seq.num_prompt_tokens - 1
        return self._num_cached(seq) * self.block_size

    def sought(self, seq: Sequence, is_stored: Callable[[BlockHash], bool]) -> list[BlockHash]:
        """Hashes of the blocks that `shared_prefix` would take if the cache had, besides its own,
        those that `is_stored` says."""
        request = seq.state.request
        is_sought = request.output_kind is OutputKind.TOKENS and not request.exclusive
        if not is_sought or not self._enable_prefix_caching or seq.fork_source is not None:
            return []
        num = self._num_found(seq, lambda each: self.is_cached(each) or is_stored(each))
        return [each for _, hashes in self._hashes_of(seq, num) for each in hashes]

    def is_cached(self, block_hash: BlockHash) -> bool:
        return block_hash in self._pool

    def cached(self, limit: int) -> Iterator[tuple[BlockHash, int]]:
        """Blocks that nobody holds, the last used ones first."""
        return islice(self._pool.cached(), limit)

    def adopt(self, hashes: list[BlockHash], sought: list[BlockHash]) -> list[int]:
        """Blocks for content that the cache lacks, as many as there are to spare beside what it has
        of `sought`: the caller fills them. They are cached as if just released."""
        held = [block for block in map(self._pool.lookup, sought) if block is not None]
        for block in held:
            self._pool.acquire(block)
        blocks = [self._pool.allocate() for _ in hashes[: self.num_spare_blocks]]
        for block, block_hash in zip(blocks, hashes, strict=False):
            self._pool.commit(block, block_hash)
        self._release([*held, *blocks][::-1])
        return blocks

    def num_blocks_taken(self, prefix: Prefix, num_tokens: int) -> int:
        """Free blocks used up by tables of `num_tokens` that start with shared ones."""
        num = self._num_blocks_for(num_tokens)
        needed = self._groups.num_needed(num, prefix.num_blocks, prefix.num_dropped)
        return needed + sum(map(self._pool.is_free, self._held(prefix.tables, prefix.num_dropped)))

    def num_admissible_blocks(self, running: list[Sequence]) -> int:
        """Free blocks less the watermark and what running prompts still need to be whole."""
        if not running:
            return self._pool.num_free
        unallocated = sum(
            self._groups.num_needed(
                self._num_blocks_for(len(seq.token_ids)), _length(seq), seq.num_dropped_blocks
            )
            for seq in running
            if seq.num_remaining_tokens > 1
        )
        return self._pool.num_free - self._watermark_blocks - unallocated

    def share(self, seq: Sequence, prefix: Prefix) -> list[tuple[int, int]]:
        """Start empty tables with blocks that others hold or that are cached. Returns what is to be
        copied into a fork's own blocks for the last, partial part of its prompt."""
        assert not seq.block_tables, "sharing comes first"
        for block in self._held(prefix.tables, prefix.num_dropped):
            self._pool.acquire(block)
        seq.block_tables = tuple(list(table) for table in prefix.tables)
        seq.num_dropped_blocks = prefix.num_dropped
        seq.num_computed_tokens = prefix.num_blocks * self.block_size
        if not prefix.partial:
            return []
        assert self.grow(seq, seq.num_computed_tokens + 1)
        seq.num_computed_tokens = seq.num_prompt_tokens - 1
        return [(a, table[-1]) for a, table in zip(prefix.partial, seq.block_tables, strict=True)]

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend the tables to hold `num_tokens` positions; False, nothing done, if it can't."""
        missing = self.num_missing(seq, num_tokens)
        if missing > self._pool.num_free:
            return False
        if missing:
            seq.block_tables = seq.block_tables or tuple([] for _ in range(self._groups.num))
            for table in seq.block_tables:
                table.extend(self._pool.allocate() for _ in range(missing // self._groups.num))
        return True

    def grow_spare(self, seq: Sequence, num_tokens: int) -> bool:
        """The same for tokens that may come to nothing: only from what is beyond the watermark."""
        missing = self.num_missing(seq, num_tokens)
        is_spare = missing == 0 or missing + self._watermark_blocks <= self._pool.num_free
        return is_spare and self.grow(seq, num_tokens)

    def commit(self, seq: Sequence, old_end: int, new_end: int) -> None:
        """Positions old_end..new_end are computed: publish the blocks that became full, and let go
        of those that fell out of the window: steps in flight begin at new_end."""
        if self._enable_prefix_caching and not seq.state.request.exclusive:
            for index in range(old_end // self.block_size, new_end // self.block_size):
                for group, table in enumerate(seq.block_tables):
                    block_hash = group_hash(self._block_hash(seq, index), group)
                    self._pool.commit(table[index], block_hash)
        num_dropped = self._groups.num_dropped(new_end // self.block_size)
        if num_dropped > seq.num_dropped_blocks:
            for table in seq.block_tables[self._groups.num_full :]:
                self._release(table[seq.num_dropped_blocks : num_dropped])
            seq.num_dropped_blocks = num_dropped

    def release(self, seq: Sequence, fence: int | None) -> None:
        """Empty the tables, tail first so that eviction keeps prefixes.

        `fence`: number of a step in flight that still writes here; None: there is none.
        """
        blocks = list(self._held(seq.block_tables, seq.num_dropped_blocks))[::-1]
        seq.block_tables = ()  # new lists will come: plans in flight keep the old ones
        seq.num_computed_tokens = seq.num_submitted_tokens = seq.num_dropped_blocks = 0
        if fence is None:
            self._release(blocks)
        elif blocks:
            self._fenced.append((fence, blocks))

    def forget_cache(self) -> None:
        self._pool.forget()

    def pass_fence(self, step: int) -> None:
        """Step number `step` and all before it are done."""
        while self._fenced and self._fenced[0][0] <= step:
            self._release(self._fenced.popleft()[1])

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        holders: Counter[int] = Counter()
        for seq in sequences:
            assert len({len(table) for table in seq.block_tables}) <= 1, "tables of two lengths"
            holders.update(self._held(seq.block_tables, seq.num_dropped_blocks))
        holders.update(chain.from_iterable(blocks for _, blocks in self._fenced))
        self._pool.check_integrity(holders)

    def _may_share(self, seq: Sequence) -> bool:
        """Cached positions give no logits: a prompt is scored by computing it once."""
        request = seq.state.request
        is_scored = request.output_kind is OutputKind.PROMPT_LOGPROBS
        is_unknown = is_scored and seq.state.needs_prompt_logprobs
        return not (request.exclusive or request.output_kind is OutputKind.POOLED or is_unknown)

    def _of_fork_source(self, seq: Sequence) -> Prefix | None:
        """All of the prompt but its last token; None: nobody has it."""
        source, end = seq.fork_source, seq.num_prompt_tokens - 1
        if source is None or source.num_submitted_tokens < end:
            return None
        if source.num_dropped_blocks > self._groups.num_dropped((end + 1) // self.block_size):
            return None  # it went on, and its window with it
        full, rest = divmod(end, self.block_size)
        return Prefix(
            full,
            max(source.num_dropped_blocks, self._groups.num_dropped(full)),
            tuple(table[:full] for table in source.block_tables),
            tuple(table[full] for table in source.block_tables) if rest else (),
        )

    def _cached_prefix(self, seq: Sequence) -> Prefix:
        num = self._num_cached(seq)
        tables = (
            [0] * first + [block for block in map(self._pool.lookup, hashes) if block is not None]
            for first, hashes in self._hashes_of(seq, num)
        )
        return Prefix(num, self._groups.num_dropped(num), tuple(tables))

    def _num_cached(self, seq: Sequence) -> int:
        return self._num_found(seq, self.is_cached) if self._enable_prefix_caching else 0

    def _num_found(self, seq: Sequence, is_there: Callable[[BlockHash], bool]) -> int:
        """Blocks of the longest start that a sequence can go on from: full groups need all of it,
        sliding ones what is not behind the window then."""
        groups = self._groups
        end = (len(seq.token_ids) - 1) // self.block_size
        for group in range(groups.num_full):
            num = 0
            while num < end and is_there(group_hash(self._block_hash(seq, num), group)):
                num += 1
            end = num
        sliding = range(groups.num_full, groups.num)
        first = end if sliding else 0
        while first > groups.num_dropped(end):
            first -= 1
            hashes = [group_hash(self._block_hash(seq, first), group) for group in sliding]
            end = end if all(map(is_there, hashes)) else first
        return end

    def _hashes_of(self, seq: Sequence, num: int) -> Iterator[tuple[int, list[BlockHash]]]:
        """For each group the blocks of a start of `num`: where they begin, and their hashes."""
        for group in range(self._groups.num):
            first = 0 if group < self._groups.num_full else self._groups.num_dropped(num)
            hashes = (self._block_hash(seq, index) for index in range(first, num))
            yield first, [group_hash(each, group) for each in hashes]

    def _block_hash(self, seq: Sequence, index: int) -> BlockHash:
        hashes = seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else seq.root_hash
            hashes.append(next_hash(parent, seq.token_ids[start : start + self.block_size]))
        return hashes[index]

    def _held(self, tables: tuple[list[int], ...], num_dropped: int) -> Iterator[int]:
        """The first positions' blocks first."""
        full = (table[:num_dropped] for table in tables[: self._groups.num_full])
        rest = (table[num_dropped:] for table in tables)
        return chain.from_iterable(chain(zip(*full, strict=True), zip(*rest, strict=True)))

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self._pool.release(block)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _length(seq: Sequence) -> int:
    return len(seq.block_tables[0]) if seq.block_tables else 0
