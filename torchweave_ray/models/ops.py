"""The arithmetic of a decoder's ops, in plain torch: what `TorchExecutor` calls, and the reference.

`Ops` is the interface; kernels/triton/ops.py has a faster one for GPUs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from torchweave_ray.attention.base import (
    AttentionBackend,
    AttentionShape,
    HeadNorms,
    LayerKV,
    StepInputs,
)
from torchweave_ray.kernels.quantization import QuantizedLinear, dequantize

Rotation = tuple[Tensor, Tensor]
"""cos and signed sin, each [T, 1, rotary_dim] fp32; sin is negated for the first half."""
Weight = Tensor | QuantizedLinear


class Ops(Protocol):
    name: str

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x [T, k] @ weight [n, k].T + bias -> [T, n]"""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        """Of rows, in fp32: x / rms(x) * (weight + offset)."""
        ...

    def add_rms_norm(
        self, hidden: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
    ) -> Tensor:
        """hidden += x in place, then rms_norm of it."""
        ...

    def rms_norm_add(
        self, hidden: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
    ) -> None:
        """hidden += rms_norm(x) in place."""
        ...

    def gated(self, x: Tensor, kind: str) -> Tensor:
        """act(gates) * ups of x [T, 2 n], gates first -> [T, n]; kind: silu or gelu_tanh"""
        ...

    def rotate_and_write(
        self,
        qkv: Tensor,
        shape: AttentionShape,
        rotation: Rotation | None,
        norms: HeadNorms,
        kv: LayerKV,
        inputs: StepInputs,
    ) -> Tensor:
        """Norm and turn queries and keys of qkv [T, heads of all three, head_dim], write keys and
        values into the cache -> queries [T, num_heads, head_dim]."""
        ...


class TorchOps:
    """`Ops` anywhere. Quantised weights are dequantised for every product."""

    name = "torch"

    def __init__(self, attention: AttentionBackend) -> None:
        self._attention = attention

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, QuantizedLinear):
            weight = dequantize(weight).to(x.dtype)
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        scale = weight.float()
        scale = scale if offset == 0.0 else scale + offset
        return functional.rms_norm(x.float(), scale.shape, scale, eps).to(x.dtype)

    def add_rms_norm(
        self, hidden: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
    ) -> Tensor:
        return self.rms_norm(hidden.add_(x), weight, eps, offset)

    def rms_norm_add(
        self, hidden: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
    ) -> None:
        hidden.add_(self.rms_norm(x, weight, eps, offset))

    def gated(self, x: Tensor, kind: str) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        if kind == "silu":
            return functional.silu(gate).mul_(up)
        return functional.gelu(gate, approximate="tanh").mul_(up)

    def rotate_and_write(
        self,
        qkv: Tensor,
        shape: AttentionShape,
        rotation: Rotation | None,
        norms: HeadNorms,
        kv: LayerKV,
        inputs: StepInputs,
    ) -> Tensor:
        num_heads, num_qk = shape.num_heads, shape.num_heads + shape.num_kv_heads
        queries, keys = qkv[:, :num_heads], qkv[:, num_heads:num_qk]
        if norms.queries is not None:
            queries = self.rms_norm(queries, norms.queries, norms.eps, norms.offset)
        if norms.keys is not None:
            keys = self.rms_norm(keys, norms.keys, norms.eps, norms.offset)
        if rotation is not None and norms.queries is None and norms.keys is None:
            turned = _rotate(qkv[:, :num_qk], *rotation)
            queries, keys = turned[:, :num_heads], turned[:, num_heads:]
        elif rotation is not None:
            queries, keys = _rotate(queries, *rotation), _rotate(keys, *rotation)
        self._attention.write_kv(keys, qkv[:, num_qk:], kv, inputs)
        return queries


def rotation_of(inv_freq: Tensor, scaling: float, positions: Tensor) -> Rotation:
    """Of `positions` [T]; inv_freq [rotary_dim / 2]."""
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, head_dim], halves paired (NeoX): (a, b) -> (a cos - b sin, b cos + a sin).
    Only the first dimensions turn where cos has fewer than x."""
    if (dim := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((_rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
