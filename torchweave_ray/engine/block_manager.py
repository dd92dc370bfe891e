"""Block tables of sequences: prefix match, sharing, growth, release behind the step's fence.

Knows blocks and sequences, not steps' budgets or who goes first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

from torchweave_ray.block_hash import BlockHash, next_hash
from torchweave_ray.config import CacheConfig
from torchweave_ray.engine.block_pool import BlockPool
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.outputs import OutputKind


class BlockManager:
    def __init__(self, limits: RuntimeLimits, cache: CacheConfig) -> None:
        self.block_size = limits.block_size
        self._kept_positions = limits.kept_positions
        self._enable_prefix_caching = cache.enable_prefix_caching
        self._watermark_blocks = int(limits.num_blocks * cache.watermark)
        self._pool = BlockPool(limits.num_blocks)
        self._fenced: deque[tuple[int, list[int]]] = deque()

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

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

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def shared_prefix(self, seq: Sequence) -> tuple[list[int], int | None]:
        """Blocks that hold the sequence's start already, not acquired yet.

        The second value is a partial block to be copied: a fork's source has more than full
        blocks. At least one token is left to compute: its logits are wanted.
        """
        request = seq.state.request
        # Cached positions give no logits: a prompt is scored by computing it once.
        is_scored = request.output_kind is OutputKind.PROMPT_LOGPROBS
        is_unknown = is_scored and seq.state.needs_prompt_logprobs
        if request.exclusive or request.output_kind is OutputKind.POOLED or is_unknown:
            return [], None
        source, end = seq.fork_source, seq.num_prompt_tokens - 1
        is_whole = source is not None and source.num_dropped_blocks == 0
        if source is not None and is_whole and source.num_submitted_tokens >= end:
            full, rest = divmod(end, self.block_size)
            return source.block_table[:full], source.block_table[full] if rest else None
        return self._match_prefix(seq), None

    def num_shared_tokens(self, seq: Sequence) -> int:
        """Tokens that `shared_prefix` saves it from computing."""
        blocks, partial = self.shared_prefix(seq)
        if partial is not None:
            return seq.num_prompt_tokens - 1
        return len(blocks) * self.block_size

    def sought_hashes(self, seq: Sequence) -> list[BlockHash]:
        """Hashes of what `shared_prefix` looks for in the cache; []: it does not."""
        request = seq.state.request
        is_sought = request.output_kind is OutputKind.TOKENS and not request.exclusive
        if not is_sought or not self._enable_prefix_caching or seq.fork_source is not None:
            return []
        return [
            self._block_hash(seq, index)
            for index in range((len(seq.token_ids) - 1) // self.block_size)
        ]

    def num_cached_blocks(self, hashes: list[BlockHash]) -> int:
        """Of the first ones."""
        cached = takewhile(lambda each: self._pool.lookup(each) is not None, hashes)
        return sum(1 for _ in cached)

    def cached(self, limit: int) -> Iterator[tuple[BlockHash, int]]:
        """Blocks that nobody holds, the last used ones first."""
        return islice(self._pool.cached(), limit)

    def adopt(self, seq: Sequence, hashes: list[BlockHash]) -> list[int]:
        """Blocks for content that follows what the cache has of a sequence, as many as there are
        to spare: the caller fills them. They are cached as if it had just released them."""
        held = self._match_prefix(seq)
        for block in held:
            self._pool.acquire(block)
        blocks = [self._pool.allocate() for _ in hashes[: self.num_spare_blocks]]
        for block, block_hash in zip(blocks, hashes, strict=False):
            self._pool.commit(block, block_hash)
        self._release([*held, *blocks][::-1])
        return blocks

    def _match_prefix(self, seq: Sequence) -> list[int]:
        if not self._enable_prefix_caching:
            return []
        blocks: list[int] = []
        for index in range((len(seq.token_ids) - 1) // self.block_size):
            block = self._pool.lookup(self._block_hash(seq, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_blocks_taken(self, shared: list[int], num_tokens: int) -> int:
        """Free blocks used up by a table of `num_tokens` that starts with `shared` ones."""
        revived = sum(self._pool.is_free(block) for block in shared)
        return self.num_blocks_for(num_tokens) - len(shared) + revived

    def num_admissible_blocks(self, running: list[Sequence]) -> int:
        """Free blocks less the watermark and what running prompts still need to be whole."""
        if not running:
            return self._pool.num_free
        unallocated = sum(
            self.num_blocks_for(len(seq.token_ids)) - len(seq.block_table)
            for seq in running
            if seq.num_remaining_tokens > 1
        )
        return self._pool.num_free - self._watermark_blocks - unallocated

    def share(self, seq: Sequence, blocks: list[int]) -> None:
        """Start an empty table with blocks that others hold or that are cached."""
        assert not seq.block_table, "sharing comes first"
        for block in blocks:
            self._pool.acquire(block)
        seq.block_table.extend(blocks)
        seq.num_computed_tokens = len(blocks) * self.block_size

    def copy_partial(self, seq: Sequence) -> int:
        """A block of its own for the last, partial prompt block of a fork; returns its id."""
        assert self.grow(seq, seq.num_computed_tokens + 1)
        seq.num_computed_tokens = seq.num_prompt_tokens - 1
        return seq.block_table[-1]

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend the table to hold `num_tokens` positions; False, and nothing done, if it can't."""
        missing = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if missing > self._pool.num_free:
            return False
        seq.block_table.extend(self._pool.allocate() for _ in range(missing))
        return True

    def grow_spare(self, seq: Sequence, num_tokens: int) -> bool:
        """The same for tokens that may come to nothing: only from what is beyond the watermark."""
        missing = self.num_blocks_for(num_tokens) - len(seq.block_table)
        is_spare = missing <= 0 or missing + self._watermark_blocks <= self._pool.num_free
        return is_spare and self.grow(seq, num_tokens)

    def commit(self, seq: Sequence, old_end: int, new_end: int) -> None:
        """Positions old_end..new_end are computed: publish the blocks that became full, and let go
        of those that fell out of the window: steps in flight begin at new_end."""
        if self._enable_prefix_caching and not seq.state.request.exclusive:
            self._publish(seq, old_end, new_end)
        if self._kept_positions is not None:
            num_dropped = max(0, new_end - self._kept_positions) // self.block_size
            self._release(seq.block_table[seq.num_dropped_blocks : num_dropped])
            seq.num_dropped_blocks = max(num_dropped, seq.num_dropped_blocks)

    def _publish(self, seq: Sequence, old_end: int, new_end: int) -> None:
        for index in range(old_end // self.block_size, new_end // self.block_size):
            self._pool.commit(seq.block_table[index], self._block_hash(seq, index))

    def release(self, seq: Sequence, fence: int | None) -> None:
        """Empty the table, tail first so that eviction keeps prefixes.

        `fence`: number of a step in flight that still writes here; None: there is none.
        """
        blocks = seq.block_table[seq.num_dropped_blocks :][::-1]
        seq.block_table = []  # a new list: plans in flight keep the old one
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
        holders = Counter(
            block for seq in sequences for block in seq.block_table[seq.num_dropped_blocks :]
        )
        holders.update(block for _, blocks in self._fenced for block in blocks)
        self._pool.check_integrity(holders)

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self._pool.release(block)

    def _block_hash(self, seq: Sequence, index: int) -> BlockHash:
        hashes = seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else seq.root_hash
            hashes.append(next_hash(parent, seq.token_ids[start : start + self.block_size]))
        return hashes[index]
