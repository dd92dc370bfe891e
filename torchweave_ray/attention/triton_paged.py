"""Paged attention on our Triton kernels: the backend on GPUs, equal to `torch_paged`.

A row's result does not depend on the batch: splits and tiles begin at fixed positions, and which
kernel computes a row follows from its own sequence. Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from torchweave_ray.attention.base import AttentionShape, LayerKV, StepInputs
from torchweave_ray.kernels.triton.attention import attend, merge
from torchweave_ray.kernels.triton.kv_write import write_kv

SPLIT = 256
"""Positions that one program of a short query reads. A constant: it would change results."""
MAX_SPLITS = 32
"""Of a sequence: with a longer context its splits are 2, 4, ... times as long. Bounds the memory of
their parts, which every sequence of a step gets as much of as the longest one."""
_MIN_ROWS = 16
"""Of a tensor core's product."""
_TILE_BYTES = 16_384
"""Of keys in a tile, at most: several of them fit the shared memory of most GPUs."""


class TritonPagedAttention:
    """An `AttentionBackend`. Reads no lengths on the host, so a step waits for nothing and can be
    captured; `StepInputs.max_seq_len` and `max_query_len` bound the grids.
    """

    def __init__(self, split: int = SPLIT, max_splits: int = MAX_SPLITS) -> None:
        """`split`: a multiple of 64."""
        self._split = split
        self._max_splits = max_splits

    def write_kv(self, keys: Tensor, values: Tensor, kv: LayerKV, inputs: StepInputs) -> None:
        """Put this step's keys and values, [T, num_kv_heads, head_dim], into their slots; a token
        whose slot is negative is padding."""
        num_tokens, num_kv_heads, head_dim = keys.shape
        if num_tokens == 0:
            return
        key_scales, value_scales = scales_of(kv)
        write_kv[(num_tokens, num_kv_heads)](
            _rows(keys), _rows(values), kv.keys, kv.values, key_scales, value_scales,
            inputs.slots_of(kv.group), *_rows(keys).stride()[:2], *_rows(values).stride()[:2],
            num_kv_heads, head_dim, triton.next_power_of_2(head_dim), kv.keys.shape[2],
            kv.key_scales is not None,
            num_warps=1,
        )  # fmt: skip

    def forward(
        self, queries: Tensor, kv: LayerKV, inputs: StepInputs, shape: AttentionShape
    ) -> Tensor:
        """Causal attention of queries [T, num_heads, head_dim] -> [T, num_heads, head_dim]."""
        queries = _rows(queries)
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        if queries.shape[0] == 0:
            return out
        group_size = shape.num_heads // shape.num_kv_heads
        short_rows = max(_MIN_ROWS, triton.next_power_of_2(group_size))
        num_splits = min(-(-inputs.max_seq_len // self._split), self._max_splits)
        self._launch(queries, kv, inputs, shape, out, short_rows, num_splits)
        if inputs.max_query_len > short_rows // group_size:
            self._launch(queries, kv, inputs, shape, out, short_rows, None)
        return out

    def _launch(
        self,
        queries: Tensor,
        kv: LayerKV,
        inputs: StepInputs,
        shape: AttentionShape,
        out: Tensor,
        short_rows: int,
        num_splits: int | None,
    ) -> None:
        """The sequences of few new tokens in `num_splits`, or the others: None."""
        num_seqs, device = inputs.seq_lens.shape[0], queries.device
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        group_size = num_heads // num_kv_heads
        dim_pad = max(16, triton.next_power_of_2(head_dim))
        tile = max(16, min(64, _TILE_BYTES // (dim_pad * queries.element_size())))
        num_rows = short_rows if num_splits else max(tile, short_rows)
        in_parts = num_splits is not None and num_splits > 1
        parts = part_sums = out
        if in_parts:
            programs = num_seqs * num_kv_heads * (num_splits or 1)
            parts = torch.empty((programs, num_rows, dim_pad), device=device)
            part_sums = torch.empty((programs, num_rows, 2), device=device)
        grid = (num_seqs, num_kv_heads, num_splits)
        if num_splits is None:
            num_tiles = queries.shape[0] // (num_rows // group_size) + num_seqs
            grid = (num_tiles, num_kv_heads, 1)
        tables = inputs.tables_of(kv.group)
        window, short_len = shape.sliding_window, short_rows // group_size
        attend[grid](
            out, parts, part_sums, queries, kv.keys, kv.values, *scales_of(kv),
            inputs.query_start_loc, inputs.seq_lens, tables, num_seqs,
            num_splits or 1, tables.stride(0), *queries.stride()[:2], shape.scale,
            shape.soft_cap or 1.0, window or 0, num_heads, num_kv_heads, head_dim, dim_pad,
            kv.keys.shape[2], num_rows, tile, self._split, self._max_splits, short_len,
            num_splits is not None, in_parts, window is not None, shape.soft_cap is not None,
            kv.key_scales is not None,
            num_warps=4,
        )  # fmt: skip
        if in_parts:
            merge[(num_seqs, num_kv_heads)](
                out, parts, part_sums, inputs.query_start_loc, inputs.seq_lens, num_splits,
                window or 0, num_heads, num_kv_heads, head_dim, dim_pad, num_rows,
                self._split, self._max_splits, short_len, window is not None,
                num_warps=4,
            )  # fmt: skip


def scales_of(kv: LayerKV) -> tuple[Tensor, Tensor]:
    """A cache without scales gives any tensors: the kernels do not look at them."""
    if kv.key_scales is None or kv.value_scales is None:
        return kv.keys, kv.values
    return kv.key_scales, kv.value_scales


def _rows(x: Tensor) -> Tensor:
    """Any strides but the last, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
