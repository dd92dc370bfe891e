"""Chained hashes of full token blocks: the prefix cache's and the router's key.

A block's hash covers tenant salt, artifact, adapter and every token up to its end, so equal hashes
mean equal KV. 128-bit BLAKE2b: a collision would serve another prompt's KV, so nothing weaker.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NewType

BlockHash = NewType("BlockHash", bytes)

_DIGEST_SIZE = 16


def root_hash(
    artifact_id: str, tenant: str = "", cache_salt: str = "", adapter_id: str = ""
) -> BlockHash:
    """The parent of the first block. Parts are length-prefixed so that they cannot run together."""
    h = blake2b(digest_size=_DIGEST_SIZE)
    for part in (artifact_id, tenant, cache_salt, *([adapter_id] if adapter_id else [])):
        raw = part.encode("utf-8")
        h.update(len(raw).to_bytes(4, "little") + raw)
    return BlockHash(h.digest())


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of the block that holds `token_ids` after `parent`."""
    return BlockHash(
        blake2b(parent + array("i", token_ids).tobytes(), digest_size=_DIGEST_SIZE).digest()
    )


def group_hash(block_hash: BlockHash, group: int) -> BlockHash:
    """Of the same tokens' block in another KV group; group 0 has the hash itself. One flipped byte
    keeps hashes as far apart as they are."""
    return BlockHash(block_hash[:-1] + bytes((block_hash[-1] ^ group,))) if group else block_hash


def hash_blocks(root: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of all full blocks of `token_ids`, first block first."""
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = next_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes


def prefix_marks(
    root: BlockHash, token_ids: Sequence[int], block_size: int
) -> tuple[tuple[int, bytes], ...]:
    """(tokens, hash) of beginnings of `token_ids` that are whole blocks, shortest first.

    At the same lengths for every prompt, each at most a quarter longer than the one before: equal
    beginnings share marks, and a prompt of 100,000 tokens has fewer than 40. For guessing who has
    a prefix, so 64 bits are enough; one pass, where `hash_blocks` starts anew for every block.
    """
    data = memoryview(array("i", token_ids)).cast("B")
    item_size = array("i").itemsize
    digest = blake2b(root, digest_size=8)
    marks = []
    num_blocks = start = 0
    while (end := (num_blocks + max(1, num_blocks // 4)) * block_size) <= len(token_ids):
        digest.update(data[start * item_size : end * item_size])
        marks.append((end, digest.copy().digest()))
        num_blocks, start = end // block_size, end
    return tuple(marks)
