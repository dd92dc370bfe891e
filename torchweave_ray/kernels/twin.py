"""Pure-torch twins of the CPU kernels: the same signatures as the methods of `ops.NativeOps`.

Written for plainness, not speed: fp32 throughout, rounded to bf16 where the kernels round.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from torchweave_ray.attention.base import (
    AttentionShape,
    LayerKV,
    StepInputs,
    dequantize_kv,
    quantize_kv,
)
from torchweave_ray.kernels.kv_layout import pack_keys, pack_values, unpack_keys, unpack_values
from torchweave_ray.kernels.packing import PackedLinear, unpack_linear, unpack_quantized
from torchweave_ray.kernels.program import RopeTable
from torchweave_ray.kernels.quantization import (
    GROUP,
    ZERO,
    QuantizedLinear,
    QuantizedRows,
    quantize_rows,
)

Activation = Literal["silu", "gelu_tanh"]


def embed(input_ids: Tensor, table: Tensor | PackedLinear, scale: float = 1.0) -> Tensor:
    """[T, k] fp32 rows of a table, plain [n, k] or packed as the head reads it."""
    rows = unpack_linear(table) if isinstance(table, PackedLinear) else table
    return rows[input_ids].float() * scale


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """[M, n] fp32 -> bf16."""
    scale = weight.float() + weight_offset
    return functional.rms_norm(x, scale.shape, scale, eps).bfloat16()


def rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> QuantizedRows:
    """[M, n] fp32 -> blocks, without rounding to bf16 first."""
    scale = weight.float() + weight_offset
    return quantize_rows(functional.rms_norm(x, scale.shape, scale, eps))


def quantize(x: Tensor) -> QuantizedRows:
    """[M, k] bf16 -> blocks, as products with quantised weights read them."""
    return quantize_rows(x)


def linear(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x [M, k] bf16, quantised if the weight is, @ weight.T + bias: fp32, or `dtype`; added to
    `residual` [M, n] fp32 in place where given. `activation`: of a gated weight; act(gates) * ups
    [M, n / 2] bf16."""
    if weight.format == "bf16":
        product = functional.linear(x.float(), unpack_linear(weight).float())
    else:
        product = _quantized_product(quantize(x), unpack_quantized(weight))
    if bias is not None:
        product += bias.float()
    if residual is not None:
        return residual.add_(product)
    if activation is None:
        return product.to(dtype)
    gate, up = product.chunk(2, dim=-1)
    if activation == "silu":
        return (functional.silu(gate) * up).bfloat16()
    return (functional.gelu(gate, approximate="tanh") * up).bfloat16()


def _quantized_product(x: QuantizedRows, weight: QuantizedLinear) -> Tensor:
    """[M, n] fp32: group by group the exact sum of the codes' products, then its scales."""
    padding = x.codes.shape[1] - weight.k
    codes = functional.pad(weight.codes, (0, padding)).float()
    if weight.mins is None:
        codes -= ZERO
    product = torch.zeros(len(x.codes), weight.n)
    for group in range(x.scales.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        part = functional.linear(x.codes[:, columns].float(), codes[:, columns])
        if weight.format != "int8":
            part *= weight.scales[:, group].float()
        if weight.mins is not None:
            part += weight.mins[:, group].float() * x.sums[:, group, None]
        product += x.scales[:, group, None] * part
    return product * weight.scales if weight.format == "int8" else product


def rope_kv(
    qkv: Tensor,
    kv: LayerKV,
    inputs: StepInputs,
    shape: AttentionShape,
    rope: RopeTable | None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """qkv [T, (num_heads + 2 num_kv_heads) * head_dim] fp32: queries normed, rotated, bf16; keys
    likewise, and values, into their slots of `kv`, as bf16 in `kv_layout`'s order or as int8 codes
    with scales."""
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    x = qkv.view(-1, heads + 2 * kv_heads, dim)
    queries, keys, values = x[:, :heads], x[:, heads:-kv_heads], x[:, -kv_heads:]
    rotated = []
    for x, norm in ((queries, q_norm), (keys, k_norm)):
        if norm is not None:
            x = functional.rms_norm(x, (dim,), norm.float(), eps)
        rotated.append(x if rope is None else _rotate(x, rope, inputs))
    block_size = kv.keys.shape[2]
    slots = inputs.slots_of(kv.group)
    blocks, offsets = slots // block_size, slots % block_size
    at = (blocks, slice(None), offsets)
    if kv.key_scales is None or kv.value_scales is None:
        cached_keys, cached_values = unpack_keys(kv.keys), unpack_values(kv.values)
        cached_keys[at], cached_values[at] = rotated[1].bfloat16(), values.bfloat16()
        kv.keys.copy_(pack_keys(cached_keys))
        kv.values.copy_(pack_values(cached_values))
    else:
        kv.keys[at], kv.key_scales[at] = quantize_kv(rotated[1])
        kv.values[at], kv.value_scales[at] = quantize_kv(values)
    return rotated[0].bfloat16().flatten(1)


def _rotate(x: Tensor, rope: RopeTable, inputs: StepInputs) -> Tensor:
    half = len(rope.inv_freq)
    rows = rope.rows(inputs.max_seq_len)[inputs.positions][:, None]
    cos, sin = rows[..., :half], rows[..., half:]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def attend(queries: Tensor, kv: LayerKV, inputs: StepInputs, shape: AttentionShape) -> Tensor:
    """Causal attention of queries [T, num_heads * head_dim] bf16 over the cache -> bf16."""
    group = shape.num_heads // shape.num_kv_heads
    out = torch.empty_like(queries)
    bounds = itertools.pairwise(inputs.query_start_loc.tolist())
    block_size, tables = kv.keys.shape[2], inputs.tables_of(kv.group)
    if kv.key_scales is None or kv.value_scales is None:
        all_keys, all_values = unpack_keys(kv.keys), unpack_values(kv.values)
    else:
        all_keys = dequantize_kv(kv.keys, kv.key_scales)
        all_values = dequantize_kv(kv.values, kv.value_scales)
    for s, (start, end) in enumerate(bounds):
        seq_len = int(inputs.seq_lens[s])
        positions = torch.arange(seq_len)
        blocks = tables[s, positions // block_size].long()
        at = (blocks, slice(None), positions % block_size)
        keys, values = all_keys[at].float(), all_values[at].float()
        q = queries[start:end].view(end - start, shape.num_heads, shape.head_dim).float()
        scores = torch.einsum("thd,lhd->htl", q, keys.repeat_interleave(group, dim=1))
        scores *= shape.scale
        if shape.soft_cap is not None:
            scores = torch.tanh(scores / shape.soft_cap) * shape.soft_cap
        own = torch.arange(seq_len - (end - start), seq_len)[:, None]
        hidden = positions > own
        if shape.sliding_window is not None:
            hidden |= positions <= own - shape.sliding_window
        shares = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        attended = torch.einsum("htl,lhd->thd", shares, values.repeat_interleave(group, dim=1))
        out[start:end] = attended.flatten(1).bfloat16()
    return out
