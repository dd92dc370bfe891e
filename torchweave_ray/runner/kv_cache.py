"""The paged KV cache: how many blocks fit, their memory, and copies between them.

Knows no sequences: which block belongs to whom is the block manager's.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV
from torchweave_ray.config import CacheConfig
from torchweave_ray.engine.kv_groups import ONE_GROUP, KVGroups
from torchweave_ray.errors import ConfigError

RAM_SHARE = 0.5
_MIN_BLOCKS = 2
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class KVShape:
    """Constants of the cache: block_bytes of attention.base over these is one block's size."""

    num_layers: int
    """Of a KV group: so many have a part of each block."""
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    """int8: codes, with scales beside them."""
    places: tuple[tuple[int, int], ...] = ()
    """(KV group, layer within it) of each layer of the model; (): one group has them all."""


@dataclass(frozen=True, slots=True)
class KVSize:
    num_blocks: int
    max_model_len: int


def size_kv_cache(
    cache: CacheConfig,
    block_bytes: int,
    free_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
    max_position_embeddings: int,
    default_share: float = RAM_SHARE,
    groups: KVGroups = ONE_GROUP,
) -> KVSize:
    """Blocks that fit and the longest sequence they hold. `default_share`: of free_bytes, where the
    configuration names none.

    Never more blocks than max_num_seqs sequences of full length could use. Raises ConfigError
    with the numbers when kv_memory is not there, or does not hold what max_model_len asks for.
    """
    wanted = max_position_embeddings if max_model_len is None else max_model_len
    if wanted > max_position_embeddings:
        raise ConfigError(
            f"max_model_len {wanted} exceeds the {max_position_embeddings} positions of the model"
        )
    budget = _budget(cache, free_bytes, default_share)
    blocks_per_seq = groups.num_needed(-(-wanted // cache.block_size))
    num_blocks = min(budget // block_bytes, max_num_seqs * blocks_per_seq)
    if max_model_len is not None and num_blocks < blocks_per_seq:
        raise ConfigError(
            f"max_model_len {wanted} needs {blocks_per_seq} KV blocks = "
            f"{_mib(blocks_per_seq * block_bytes)}; {_described(cache, budget, free_bytes)} holds "
            f"{num_blocks}: lower max_model_len or raise kv_memory"
        )
    least = min(_MIN_BLOCKS * groups.num, blocks_per_seq)
    if num_blocks < least:
        raise ConfigError(
            f"{_described(cache, budget, free_bytes)} holds {num_blocks} KV blocks of "
            f"{_mib(block_bytes)}, at least {least} are needed: raise kv_memory"
        )
    longest = groups.longest(num_blocks)
    held = wanted if longest is None else longest * cache.block_size
    return KVSize(num_blocks, min(wanted, held))


def _budget(cache: CacheConfig, free_bytes: int, default_share: float) -> int:
    if cache.kv_memory == "auto":
        share = default_share if cache.kv_memory_share is None else cache.kv_memory_share
        return int(free_bytes * share / cache.replicas_per_node)
    if cache.kv_memory > free_bytes:
        raise ConfigError(
            f"kv_memory {_mib(cache.kv_memory)} exceeds the {_mib(free_bytes)} that are free "
            "for this process (machine and cgroup)"
        )
    return cache.kv_memory


def _described(cache: CacheConfig, budget: int, free_bytes: int) -> str:
    if cache.kv_memory == "auto":
        return f"kv_memory auto, {_mib(budget)} of {_mib(free_bytes)} free,"
    return f"kv_memory {_mib(budget)}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"


class KVCache:
    """All blocks in one allocation, scales in another, zeroed: no stale NaN is ever read.

    On the host it is fresh pages of the system: they cost memory only once they are written.
    """

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        self._size = shape, num_blocks, device
        self.open()

    def open(self) -> None:
        """Take the memory, again after `close`."""
        shape, num_blocks, device = self._size
        dims = (shape.num_layers, 2, num_blocks, shape.num_kv_heads, shape.block_size)
        self._parts = [_zeros((*dims, shape.head_dim), shape.dtype, device)]
        if shape.dtype == torch.int8:
            self._parts.append(_zeros(dims, torch.float32, device))
        halves = [
            [half for part in of_layer for half in part]
            for of_layer in zip(*self._parts, strict=True)
        ]
        places = shape.places or [(0, index) for index in range(shape.num_layers)]
        self.layers: tuple[LayerKV, ...] = tuple(
            LayerKV(*halves[index], group=group) for group, index in places
        )

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks of all their layers; every source is read before."""
        if not pairs:
            return
        for part in self._parts:
            sources, destinations = torch.tensor(pairs, device=part.device).T
            part[:, :, destinations] = part[:, :, sources]

    @property
    def block_bytes(self) -> int:
        return self.num_bytes // self._size[1]

    def read_block(self, block: int) -> memoryview:
        """A copy of one block, all its layers."""
        parts = [part[:, :, block].contiguous().view(torch.uint8).flatten() for part in self._parts]
        return memoryview(torch.cat(parts).cpu().numpy().data)

    def write_block(self, block: int, content: memoryview) -> None:
        """What `read_block` gave."""
        start = 0
        for part in self._parts:
            of_block = part[:, :, block]
            end = start + of_block.nbytes
            stored = torch.frombuffer(content[start:end], dtype=part.dtype)
            of_block.copy_(stored.view(of_block.shape))
            start = end

    def close(self) -> None:
        """Let go of the memory; the layers are gone."""
        self.layers = ()
        self._parts = []


def _zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return _lazy_zeros(dims, dtype)
    return torch.zeros(dims, dtype=dtype, device=device)


def _lazy_zeros(dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-aligned zeros that the system commits on first touch."""
    memory = mmap.mmap(-1, prod(dims) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: far fewer TLB misses when walking blocks
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(dims)
