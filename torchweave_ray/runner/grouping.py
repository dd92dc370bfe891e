"""Which layers of a model share blocks: KV groups of equally many layers, by how far layers see.

As in vLLM's hybrid KV cache and transformers' PagedAttentionCache; knows no sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchweave_ray.engine.kv_groups import ONE_GROUP, KVGroups
from torchweave_ray.kernels.kv_layout import TILE

MAX_GROUPS = 8
"""Each is one more block table of every sequence."""
MAX_PADDING = 1 / 6
"""Of all layers: what groups that are not full may waste."""


@dataclass(frozen=True, slots=True)
class Grouping:
    groups: KVGroups
    num_layers: int
    """Of a group; the last one of a kind may have fewer."""
    places: tuple[tuple[int, int], ...]
    """(group, layer within it) of each layer."""


def group_layers(
    sliding_layers: Sequence[bool],
    window: int | None,
    block_size: int,
    longest: int,
    max_chunk: int,
    step_depth: int = 0,
) -> Grouping:
    """`sliding_layers`: which layers see `window` positions; `longest`: positions of the longest
    sequence; `max_chunk`: tokens of one sequence in a step.

    One group of all layers, which keeps everything, where nothing would ever be let go of, or
    where no division saves memory.
    """
    num_layers, num_sliding = len(sliding_layers), sum(sliding_layers)
    kept_blocks = -(-((window or 0) + TILE) // block_size)
    size = None
    if num_sliding and longest > (kept_blocks + 1) * block_size:
        size = _group_size(num_layers - num_sliding, num_sliding)
    if size is None:
        return Grouping(ONE_GROUP, num_layers, tuple((0, i) for i in range(num_layers)))
    num_full = -(-(num_layers - num_sliding) // size)
    counts, places = {False: 0, True: num_full * size}, []
    for is_sliding in sliding_layers:
        places.append(divmod(counts[is_sliding], size))
        counts[is_sliding] += 1
    groups = KVGroups(
        num_full,
        -(-num_sliding // size),
        kept_blocks,
        max_chunk,
        chunk_blocks=-(-(1 + step_depth) * max_chunk // block_size) + 1,
    )
    return Grouping(groups, size, tuple(places))


def _group_size(num_full: int, num_sliding: int) -> int | None:
    """Layers of a group: what a long sequence costs decides, then padding, then how few there are.
    None: no size saves memory within the bounds above."""
    num_layers = num_full + num_sliding
    found: list[tuple[int, int, int]] = []
    for size in range(1, num_layers + 1):
        full, sliding = -(-num_full // size), -(-num_sliding // size)
        in_all = (full + sliding) * size
        is_fit = full + sliding <= MAX_GROUPS and in_all <= (1 + MAX_PADDING) * num_layers
        if is_fit and full * size < num_layers:
            found.append((full * size, in_all, -size))
    return -min(found)[2] if found else None
