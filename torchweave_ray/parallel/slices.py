"""Which slice of a model a rank computes: its tensors, and the DecoderSpec that reads them.

Heads, gates and ups, and the vocabulary are cut by rows; what brings them back to the residual
stream (o, down, experts' down) by columns, so that its products of all ranks add up. Norms and
routers are whole everywhere. Scheme: Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from torchweave_ray.errors import ConfigError
from torchweave_ray.kernels.quantization import GROUP, QuantizedLinear
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.decoder import build_decoder
from torchweave_ray.models.spec import DecoderSpec, Embed, Experts, Linear, Op
from torchweave_ray.models.tensors import EMBED, HEAD, FusedTensor, fused_tensors

_COLUMNS = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True, slots=True)
class Slice:
    """One of `num_ranks` equal parts of a model."""

    rank: int
    num_ranks: int

    def of(self, length: int) -> range:
        size = length // self.num_ranks
        return range(self.rank * size, (self.rank + 1) * size)


def check_divides(
    config: ModelConfig, num_ranks: int, tensors: Sequence[FusedTensor] | None = None
) -> None:
    """Raises ConfigError naming the number of the model that cannot be cut so. `tensors`: with the
    formats that an artifact has."""
    counts = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
    }
    tensors = fused_tensors(config) if tensors is None else tensors
    if any(tensor.name.endswith(".gate_up_proj.weight") for tensor in tensors):
        counts["intermediate_size"] = config.intermediate_size
    if config.experts is not None:
        counts["moe_intermediate_size"] = config.experts.intermediate_size
    for name, count in counts.items():
        if count % num_ranks:
            raise ConfigError(
                f"tensor_parallel_size {num_ranks} does not divide the model's {name} {count}"
            )
    for tensor in tensors:
        columns = tensor.shape[-1] // num_ranks
        if _is_in_groups(tensor) and tensor.name.endswith(_COLUMNS) and columns % GROUP:
            raise ConfigError(
                f"tensor_parallel_size {num_ranks} would leave {columns} inputs of {tensor.name} "
                f"to a rank, which {tensor.format} has in groups of {GROUP}"
            )


def _is_in_groups(tensor: FusedTensor) -> bool:
    return "group" in tensor.format


def sliced_spec(config: ModelConfig, part: Slice) -> DecoderSpec:
    """The decoder of a rank: heads, widths and rows of the vocabulary are its own; `vocab_size` is
    the whole model's, as its executor's logits are."""
    num = part.num_ranks
    experts = config.experts
    if experts is not None:
        experts = replace(experts, intermediate_size=experts.intermediate_size // num)
    own = replace(
        config,
        num_heads=config.num_heads // num,
        num_kv_heads=config.num_kv_heads // num,
        intermediate_size=config.intermediate_size // num,
        experts=experts,
    )
    spec = build_decoder(own)
    first_row = part.rank * vocab_rows(config, num)
    return replace(spec, ops=tuple(_sliced_op(op, first_row) for op in spec.ops))


def _sliced_op(op: Op, first_row: int) -> Op:
    if isinstance(op, Embed):
        return replace(op, first_row=first_row)
    if isinstance(op, Linear) and op.weight.endswith(_COLUMNS):
        return replace(op, is_partial=True)
    return replace(op, is_partial=True) if isinstance(op, Experts) else op


def vocab_rows(config: ModelConfig, num_ranks: int) -> int:
    """Of each rank; the last one's may end with rows of no token."""
    return -(-config.vocab_size // num_ranks)


def sliced_tensor(
    tensor: FusedTensor, whole: Tensor | QuantizedLinear, config: ModelConfig, part: Slice
) -> Tensor | QuantizedLinear:
    """A rank's slice of an artifact's row-major tensor; a view where it can be."""
    if tensor.name in (EMBED, HEAD):
        return _vocabulary(whole, vocab_rows(config, part.num_ranks), part.rank)
    if tensor.name.endswith(_COLUMNS):
        return _columns(whole, part)
    if lengths := _row_parts(tensor, config):
        return _rows(whole, lengths, part)
    return whole


def _row_parts(tensor: FusedTensor, config: ModelConfig) -> list[int]:
    """Rows of the parts of which each rank has its share; []: it is not cut by rows."""
    if ".qkv_proj." in tensor.name:
        keys = config.num_kv_heads * config.head_dim
        return [config.num_heads * config.head_dim, keys, keys]
    if ".experts.gate_up_proj." in tensor.name:
        assert config.experts is not None
        return [config.experts.intermediate_size] * (2 * config.experts.num)
    return [config.intermediate_size] * 2 if ".gate_up_proj." in tensor.name else []


def _rows(
    whole: Tensor | QuantizedLinear, lengths: Sequence[int], part: Slice
) -> Tensor | QuantizedLinear:
    rows: list[Tensor] = []
    first = 0
    for length in lengths:
        own = part.of(length)
        rows.append(torch.arange(first + own.start, first + own.stop))
        first += length
    ids = torch.cat(rows)
    return whole.rows(ids) if isinstance(whole, QuantizedLinear) else whole[ids]


def _columns(whole: Tensor | QuantizedLinear, part: Slice) -> Tensor | QuantizedLinear:
    if isinstance(whole, Tensor):
        return _cut(whole, part)
    if whole.scales.dim() == 1:
        return replace(whole, codes=_cut(whole.codes, part))
    mins = None if whole.mins is None else _cut(whole.mins, part)
    return replace(whole, codes=_cut(whole.codes, part), scales=_cut(whole.scales, part), mins=mins)


def _cut(matrix: Tensor, part: Slice) -> Tensor:
    own = part.of(matrix.shape[1])
    return matrix[:, own.start : own.stop].contiguous()


def _vocabulary(
    whole: Tensor | QuantizedLinear, num_rows: int, rank: int
) -> Tensor | QuantizedLinear:
    if isinstance(whole, Tensor):
        return _padded(whole[rank * num_rows : (rank + 1) * num_rows], num_rows)
    first, last = rank * num_rows, (rank + 1) * num_rows
    mins = None if whole.mins is None else _padded(whole.mins[first:last], num_rows)
    return QuantizedLinear(
        whole.format,
        _padded(whole.codes[first:last], num_rows),
        _padded(whole.scales[first:last], num_rows),
        mins,
    )


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    """Zeros below: equal shapes on all ranks, and nobody looks at what comes of them."""
    missing = num_rows - rows.shape[0]
    if missing == 0:
        return rows
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))
