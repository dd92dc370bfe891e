"""KV groups in numbers: which layers share blocks, what a sequence takes, what is let go of."""

from __future__ import annotations

import random

import pytest
import torch

from tests.echo import EOS, VOCAB
from tests.engine.test_scheduler import make_engine, make_request, run
from torchweave_ray.attention.base import block_bytes
from torchweave_ray.config import CacheConfig
from torchweave_ray.engine.kv_groups import ONE_GROUP, KVGroups
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.runner.grouping import MAX_GROUPS, MAX_PADDING, group_layers
from torchweave_ray.runner.kv_cache import size_kv_cache

GEMMA3_4B = [(layer + 1) % 6 != 0 for layer in range(34)]


def test_a_sequence_never_takes_more_than_is_promised() -> None:
    """Grown in random chunks, with steps in flight whose blocks are not let go of yet."""
    rng = random.Random(0)
    for _ in range(300):
        size, depth, chunk = rng.choice([1, 4, 16]), rng.randint(0, 1), rng.randint(1, 100)
        num_full, window = rng.randint(0, 2), rng.randint(1, 200)
        chunk_blocks = -(-(1 + depth) * chunk // size) + 1
        kept = -(-window // size)
        groups = KVGroups(num_full, rng.randint(1, 3), kept, chunk, chunk_blocks)
        total, ends, most = rng.randint(1, 1000), [0], 0
        while ends[-1] < total:
            ends.append(min(total, ends[-1] + rng.randint(1, chunk)))
            computed = ends[max(0, len(ends) - 2 - depth)]
            length, dropped = -(-ends[-1] // size), groups.num_dropped(computed // size)
            assert dropped * size <= max(0, computed - window)
            most = max(most, groups.num * length - groups.num_sliding * dropped)
            rest = groups.num_needed(-(-total // size), length, dropped)
            assert rest >= num_full * (-(-total // size) - length)
        needed = groups.num_needed(-(-total // size))
        assert most <= needed
        longest = groups.longest(needed)
        assert longest is None or longest >= -(-total // size)
        for pool in (needed, needed + 1, rng.randint(1, 500)):
            longest = groups.longest(pool)
            assert longest is None or groups.num_needed(longest) <= pool
            assert longest is None or groups.num_needed(longest + 1) > pool
            assert longest is not None or groups.num_needed(1 << 40) <= pool


@pytest.mark.parametrize(
    ("sliding", "window", "size", "num_full", "num_sliding"),
    [
        (GEMMA3_4B, 1024, 5, 1, 6),
        ([(layer + 1) % 6 != 0 for layer in range(62)], 1024, 10, 1, 6),  # Gemma 3 27B
        ([layer % 2 == 0 for layer in range(26)], 4096, 13, 1, 1),  # Gemma 2 2B
        ([layer >= 21 for layer in range(28)], 4096, 7, 3, 1),  # Qwen2 7B with its windows
        ([True] * 32, 4096, 32, 0, 1),  # Mistral
        ([False] * 32, None, 32, 1, 0),
        ([True, *[False] * 27], 100, 28, 1, 0),  # nothing to gain
        (GEMMA3_4B, 32768 - 64, 34, 1, 0),  # nothing ever falls out
    ],
)
def test_layers_of_a_group_see_equally_far(
    sliding: list[bool], window: int | None, size: int, num_full: int, num_sliding: int
) -> None:
    found = group_layers(sliding, window, 16, 32768, 512)
    groups = found.groups
    assert (found.num_layers, groups.num_full, groups.num_sliding) == (size, num_full, num_sliding)
    assert len(set(found.places)) == len(sliding)
    assert {index for _, index in found.places} == set(range(size))
    assert groups.num <= MAX_GROUPS
    assert groups.num * size <= (1 + MAX_PADDING) * len(sliding)
    if num_sliding:
        kinds = [group >= num_full for group, _ in found.places]
        assert kinds == sliding
        assert groups.kept_blocks * 16 >= (window or 0) + 64


def test_a_long_text_takes_little_more_than_its_full_layers() -> None:
    """The figure of docs/models.md: Gemma 3 4B's shape in 2 GiB."""
    found = group_layers(GEMMA3_4B, 1024, 16, 131_072, 1024)
    cache, longest = CacheConfig(kv_memory=2 << 30), []
    for num_layers, groups in ((34, ONE_GROUP), (found.num_layers, found.groups)):
        num_bytes = block_bytes(num_layers, 4, 256, 16, torch.bfloat16)
        size = size_kv_cache(cache, num_bytes, 4 << 30, 32, None, 131_072, groups=groups)
        longest.append(size.max_model_len)
    assert longest == [15_408, 92_080]


def test_a_prompt_begins_with_what_its_windows_still_have() -> None:
    """Full layers need all blocks before the hit, sliding ones the last few: at the end of a shared
    beginning, too, until they are given to others."""
    groups = KVGroups(1, 2, kept_blocks=2, max_chunk=64, chunk_blocks=5)
    limits = RuntimeLimits(120, 16, 400, VOCAB, (EOS,), groups=groups)
    engine, _ = make_engine(limits, CacheConfig(watermark=0.0), max_num_seqs=4)
    first = make_request("a", 200)
    longer = make_request("b", 230)
    shared = (*first.prompt_token_ids[:100], *longer.prompt_token_ids[100:])

    def hit(prompt: tuple[int, ...], name: str) -> int:
        request = make_request(name, len(prompt))
        engine.add(type(request)(name, "echo", prompt, request.sampling))
        outputs = run(engine)[name]
        assert outputs[-1].usage is not None
        return outputs[-1].usage.cached_tokens

    assert hit(first.prompt_token_ids, "1") == 0
    assert hit(first.prompt_token_ids, "2") == 192
    assert hit(shared, "3") == 96
    assert hit(tuple(reversed(longer.prompt_token_ids)), "4") == 0
    pool = engine._scheduler.blocks._pool
    assert pool.num_free == 120
    for _ in range(120):  # others' content in all of them
        pool.allocate()
    for block in range(120):
        pool.release(block)
    assert hit(first.prompt_token_ids, "5") == 0
