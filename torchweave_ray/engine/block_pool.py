"""The blocks of KV memory: free list, reference counts, and the map from hash to block.

A block that nobody holds keeps its content and hash until it is allocated again, oldest first.
Knows nothing of sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from torchweave_ray.block_hash import BlockHash


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        # Least recently released first; blocks without a hash are put in front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_committed = 0
        """Times that a block was published."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take the block that is cheapest to lose. The caller checked `num_free`."""
        block, _ = self._free.popitem(last=False)
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def __contains__(self, block_hash: object) -> bool:
        """Whether some block holds this content."""
        return block_hash in self._by_hash

    def lookup(self, block_hash: BlockHash) -> int | None:
        """The block that holds this content, held or free."""
        return self._by_hash.get(block_hash)

    def is_free(self, block: int) -> bool:
        return self._ref_counts[block] == 0

    def acquire(self, block: int) -> None:
        """One more holder of a block that is held or cached."""
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one leaves it to the free list, its content cached."""
        assert self._ref_counts[block] > 0, f"block {block} released twice"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free[block] = None
            if self._hashes[block] is None:
                self._free.move_to_end(block, last=False)

    def commit(self, block: int, block_hash: BlockHash) -> None:
        """Publish a full, computed block. The first block with a hash stays the cached one."""
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block
            self.num_committed += 1

    def cached(self) -> Iterator[tuple[BlockHash, int]]:
        """Free blocks that hold something, the last released first."""
        for block in reversed(self._free):
            block_hash = self._hashes[block]
            if block_hash is not None:
                yield block_hash, block

    def forget(self) -> None:
        """No block holds anything any more; all are free."""
        assert self.num_free == self.num_blocks, "a block is held"
        self._by_hash.clear()
        self._hashes = [None] * self.num_blocks

    def check_integrity(self, holders: dict[int, int]) -> None:
        """`holders` counts for each block the tables that hold it. I1-I3 of docs/structures.md."""
        for block, count in enumerate(self._ref_counts):
            assert count == holders.get(block, 0), (
                f"block {block}: {count} references, {holders.get(block, 0)} holders"
            )
            assert (count == 0) == (block in self._free), f"block {block} free and held"
        for block_hash, block in self._by_hash.items():
            assert self._hashes[block] == block_hash, f"block {block} is cached under a stale hash"
        assert len(self._by_hash) == sum(h is not None for h in self._hashes)
