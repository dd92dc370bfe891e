"""torch's own paged attention, `varlen_attn` with a block table, over our cache: an option on GPUs.

Our kernels write the cache. It has no soft cap, reads no int8 cache, and splits contexts by the
longest one of a batch, so that rows depend on it.
"""

from __future__ import annotations

import inspect

from torch import Tensor

from torchweave_ray.attention.base import AttentionBackend, AttentionShape, LayerKV, StepInputs
from torchweave_ray.errors import ConfigError

PAGE = 256
"""Blocks must be multiples of it: FlashAttention 2 reads no smaller ones."""


def why_no_varlen(block_size: int) -> str | None:
    """None: it can be used with a cache of such blocks."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return f"this torch has no varlen_attn ({error})"
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return "varlen_attn of this torch takes no block_table"
    if block_size % PAGE:
        return f"cache.block_size {block_size} is no multiple of {PAGE}"
    return None


class VarlenAttention:
    """An `AttentionBackend`."""

    def __init__(self, writer: AttentionBackend) -> None:
        """`writer`: writes the cache."""
        from torch.nn.attention.varlen import varlen_attn

        self._writer = writer
        self._attend = varlen_attn

    def write_kv(self, keys: Tensor, values: Tensor, kv: LayerKV, inputs: StepInputs) -> None:
        """Put this step's keys and values, [T, num_kv_heads, head_dim], into their slots."""
        self._writer.write_kv(keys, values, kv, inputs)

    def forward(
        self, queries: Tensor, kv: LayerKV, inputs: StepInputs, shape: AttentionShape
    ) -> Tensor:
        """Causal attention of queries [T, num_heads, head_dim] -> [T, num_heads, head_dim]. Raises
        ConfigError for a model or cache that it cannot compute."""
        if shape.soft_cap is not None or kv.key_scales is not None:
            what = "an int8 cache" if shape.soft_cap is None else "soft caps"
            raise ConfigError(f"runner.attention 'varlen' has not {what}: set it to 'auto'")
        window = -1 if shape.sliding_window is None else shape.sliding_window - 1
        attended = self._attend(
            queries,
            kv.keys.transpose(1, 2),
            kv.values.transpose(1, 2),
            inputs.query_start_loc,
            None,
            inputs.max_query_len,
            inputs.max_seq_len,
            scale=shape.scale,
            window_size=(window, 0),
            enable_gqa=shape.num_heads != shape.num_kv_heads,
            seqused_k=inputs.seq_lens,
            block_table=inputs.tables_of(kv.group),
        )
        assert isinstance(attended, Tensor)
        return attended
