"""How a bf16 KV cache lies for the native kernels: 16 positions of a head together, in the order in
which the products read them. An int8 cache is row-major, as all caches of the torch executor are.

The shape stays [num_blocks, num_kv_heads, block_size, head_dim]: only the order within a block of a
head is another, so whole blocks can be copied without knowing.
"""

from __future__ import annotations

from torch import Tensor

SUB = 16
"""Positions that lie together; block_size is a multiple."""
TILE = 64
"""A query's window is read from a whole tile of positions on; what lies before it, is not."""


def pack_keys(rows: Tensor) -> Tensor:
    """Row-major -> 16 positions as [head_dim / 2, 16, 2]."""
    blocks, heads, size, dim = rows.shape
    subs = rows.view(blocks, heads, size // SUB, SUB, dim // 2, 2)
    return subs.transpose(3, 4).reshape(rows.shape)


def unpack_keys(keys: Tensor) -> Tensor:
    blocks, heads, size, dim = keys.shape
    subs = keys.view(blocks, heads, size // SUB, dim // 2, SUB, 2)
    return subs.transpose(3, 4).reshape(keys.shape)


def pack_values(rows: Tensor) -> Tensor:
    """Row-major -> two positions as [head_dim, 2]."""
    blocks, heads, size, dim = rows.shape
    return rows.view(blocks, heads, size // 2, 2, dim).transpose(3, 4).reshape(rows.shape)


def unpack_values(values: Tensor) -> Tensor:
    blocks, heads, size, dim = values.shape
    return values.view(blocks, heads, size // 2, dim, 2).transpose(3, 4).reshape(values.shape)
