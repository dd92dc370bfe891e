"""Block hashes and the block pool: what equal hashes mean, and what is evicted first."""

from __future__ import annotations

import pytest

from torchweave_ray.block_hash import hash_blocks, next_hash, root_hash
from torchweave_ray.engine.block_pool import BlockPool


def test_a_hash_covers_salt_artifact_and_the_whole_prefix() -> None:
    tokens = list(range(64))
    base = hash_blocks(root_hash("artifact", "tenant", "salt"), tokens, 16)
    assert len(base) == 4
    assert len(set(base)) == 4
    assert hash_blocks(root_hash("artifact", "tenant", "salt"), tokens[:50], 16) == base[:3]
    for other in [
        root_hash("artifacu", "tenant", "salt"),
        root_hash("artifact", "tenan", "tsalt"),
        root_hash("artifact", "", "tenantsalt"),
    ]:
        assert not set(hash_blocks(other, tokens, 16)) & set(base)
    changed = hash_blocks(root_hash("artifact", "tenant", "salt"), [1, *tokens[1:]], 16)
    assert not set(changed) & set(base), "a changed first token changes every hash after it"


def test_released_blocks_are_evicted_oldest_first_and_uncached_ones_before() -> None:
    pool = BlockPool(4)
    root = root_hash("a")
    blocks = [pool.allocate() for _ in range(4)]
    for i, block in enumerate(blocks[:3]):
        pool.commit(block, next_hash(root, [i]))
    for block in (blocks[1], blocks[3], blocks[0]):
        pool.release(block)
    assert pool.allocate() == blocks[3], "nothing is cached in it"
    assert pool.allocate() == blocks[1], "released first"
    assert pool.lookup(next_hash(root, [1])) is None
    assert pool.lookup(next_hash(root, [0])) == blocks[0]


def test_a_cached_block_comes_back_from_the_free_list() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    key = next_hash(root_hash("a"), [1])
    pool.commit(block, key)
    pool.release(block)
    pool.acquire(block)
    assert pool.num_free == 1
    assert pool.lookup(key) == block
    pool.check_integrity({block: 1})


def test_releasing_twice_is_caught() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(block)
