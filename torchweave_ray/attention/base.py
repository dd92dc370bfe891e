"""What attention and executors share: the batch of a step as tensors, and the KV cache of a layer.

A flat varlen batch: all tokens of all sequences one behind the other, prompt chunks and decodes
mixed. Knows nothing of sequences, requests or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows [start, end) of a batch, all those of one LoRA adapter."""

    adapter: object
    """As the executor that runs the batch loaded it."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's batch on the device. T tokens, S sequences, R rows that need logits."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [G * T] int64: block_id * block_size + offset, where the token's KV goes
    # (negative for padding, which goes nowhere; triton_paged only), for each of G KV groups
    query_start_loc: Tensor  # [S + 1] int32: sequence s owns tokens [s] .. [s + 1]
    seq_lens: Tensor  # [S] int32: positions in the cache after this step
    block_tables: Tensor  # [G * S, max_blocks] int32, rows padded with 0, group by group
    logit_rows: Tensor  # [R] int64: indices into T
    max_query_len: int
    max_seq_len: int
    adapters: tuple[AdapterRows, ...] = ()
    """They follow each other up to the last row; the rows before the first have none."""
    num_padding: int = 0
    """Sequences at the end that stand for nothing, one token each."""
    packed: tuple[Tensor, Tensor] | None = None
    """Of a padded batch: all int64 and all int32 tensors above, in one piece each."""

    def slots_of(self, group: int) -> Tensor:
        """[T] of a KV group."""
        return _part(self.slot_mapping, group, self.input_ids.shape[0])

    def tables_of(self, group: int) -> Tensor:
        """[S, max_blocks] of a KV group."""
        return _part(self.block_tables, group, self.seq_lens.shape[0])


def _part(rows: Tensor, group: int, num: int) -> Tensor:
    return rows if rows.shape[0] == num else rows[group * num : (group + 1) * num]


@dataclass(frozen=True, slots=True)
class LayerKV:
    """KV cache of one layer. An int8 one holds codes, with a scale for each head and position.

    What lies where within a block of a head is the executor's own: the native one orders a bf16
    cache its way (kernels/kv_layout.py). So executors share no cache; whole blocks can be copied.

    Scales are fp32, not bf16 or fp16: that takes any range of keys, needs no conversion where it
    is read, and costs 3 % of the cache.
    """

    keys: Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    values: Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    key_scales: Tensor | None = None  # [num_blocks, num_kv_heads, block_size] float32
    value_scales: Tensor | None = None
    group: int = field(default=0, kw_only=True)
    """Whose slots and block tables of a step it is written and read by."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The constants of one attention op."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    """Positions a query sees, itself included; None: all before it."""
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorms of each head's queries and keys, before they are turned; None: there is none."""

    queries: Tensor | None = None  # [head_dim]
    keys: Tensor | None = None  # [head_dim]
    eps: float = 1e-6
    offset: float = 0.0
    """Added to the weights."""


class AttentionBackend(Protocol):
    """Paged attention over a step's batch. `torch_paged` is the reference all others equal."""

    def write_kv(self, keys: Tensor, values: Tensor, kv: LayerKV, inputs: StepInputs) -> None:
        """Put this step's keys and values, [T, num_kv_heads, head_dim], into their slots."""
        ...

    def forward(
        self, queries: Tensor, kv: LayerKV, inputs: StepInputs, shape: AttentionShape
    ) -> Tensor:
        """Causal attention of queries [T, num_heads, head_dim] -> [T, num_heads, head_dim]."""
        ...


def block_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> int:
    """Bytes of one block over all layers, keys and values, with the scales that int8 has."""
    row = head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == torch.int8 else 0)
    return 2 * num_layers * num_kv_heads * block_size * row


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., head_dim] -> codes int8 of that shape and scales [..] float32: x = code * scale.

    Symmetric, scale = max|x| / 127. Where x is not finite the scale is NaN: that position is
    spoilt, and no other.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1) / 127.0
    scales = scales.masked_fill(~x.isfinite().all(dim=-1), torch.nan)
    codes = (x / scales[..., None]).round().clamp(-127, 127)
    codes = codes.masked_fill(~(scales > 0.0)[..., None], 0.0)
    return codes.to(torch.int8), scales


def dequantize_kv(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 of codes [.., head_dim] and scales [..]."""
    return codes.float() * scales[..., None]
