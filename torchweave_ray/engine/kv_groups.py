"""KV groups: layers whose blocks live equally long share a block table, and all groups one pool.

A block of the pool holds some positions of one group's layers, of which every group has equally
many. Full groups keep all blocks of a sequence; sliding ones let go of those behind the window.
Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVGroups:
    """How many block tables a sequence has. Full groups come first; all sliding ones have the same
    window."""

    num_full: int = 1
    num_sliding: int = 0
    kept_blocks: int = 0
    """Of a sliding group: whole blocks before a sequence's last so many are never read again."""
    max_chunk: int = 1 << 30
    """Tokens of one sequence that a step may compute."""
    chunk_blocks: int = 0
    """That the chunks of all steps in flight may be in, beside `kept_blocks`, of a sliding group.
    Sequences are let in on the strength of it."""

    def __post_init__(self) -> None:
        assert self.num > 0
        assert self.num_sliding == 0 or min(self.kept_blocks, self.chunk_blocks) > 0

    @property
    def num(self) -> int:
        return self.num_full + self.num_sliding

    def num_dropped(self, num_whole: int) -> int:
        """Blocks that a sliding group lets go of once so many whole ones are computed."""
        return max(0, num_whole - self.kept_blocks) if self.num_sliding else 0

    def num_needed(self, num_blocks: int, num_there: int = 0, num_dropped: int = 0) -> int:
        """Of the pool, at most at any time, for tables that grow to `num_blocks` each from
        `num_there`, of which sliding groups have dropped some."""
        missing = max(0, num_blocks - num_there)
        if not self.num_sliding:
            return self.num_full * missing
        room = self.kept_blocks + self.chunk_blocks - (num_there - num_dropped)
        return self.num_full * missing + self.num_sliding * min(missing, max(0, room))

    def longest(self, num_blocks: int) -> int | None:
        """Blocks of positions of the longest sequence that a pool of `num_blocks` holds; None: it
        holds any."""
        most = self.kept_blocks + self.chunk_blocks
        if not self.num_sliding or num_blocks < self.num * most:
            return num_blocks // self.num
        if not self.num_full:
            return None
        return most + (num_blocks - self.num * most) // self.num_full


ONE_GROUP = KVGroups()
"""Of a model whose layers all see everything."""
