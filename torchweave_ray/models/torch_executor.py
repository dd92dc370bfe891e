"""The reference executor: a DecoderSpec run op by op with torch, on any device, in fp32 or bf16.

Owns the weights. Attention and the KV cache are somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from torchweave_ray.attention.base import AttentionBackend, LayerKV, StepInputs
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.spec import (
    Attention,
    DecoderSpec,
    Embed,
    GatedActivation,
    Linear,
    Op,
    RMSNorm,
    Rope,
)


class TorchExecutor:
    """An `Executor`. `tensors` hold what `spec.tensors` names, all of one dtype and device."""

    name = "torch"

    def __init__(
        self, spec: DecoderSpec, tensors: Mapping[str, Tensor], attention: AttentionBackend
    ) -> None:
        """Raises ArtifactError naming a tensor that is missing or that no op uses."""
        if missing := sorted(set(spec.tensors) - set(tensors)):
            raise ArtifactError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
        if surplus := sorted(set(tensors) - set(spec.tensors)):
            raise ArtifactError(f"tensor {surplus[0]} is used by no op ({len(surplus)} in all)")
        self._spec = spec
        self._tensors = dict(tensors)
        self._attention = attention
        device = next(iter(tensors.values())).device
        ropes = {op.rope for op in spec.ops if isinstance(op, Attention) and op.rope is not None}
        self._inv_freqs = {rope: torch.tensor(rope.inv_freq, device=device) for rope in ropes}

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`: [R, vocab_size] float32."""
        step = self._decode(inputs, kv)
        for op in self._spec.head_ops:
            step.run(op)
        logits = step.buffers["logits"].float()
        if self._spec.logits_soft_cap is not None:
            logits = torch.tanh(logits / self._spec.logits_soft_cap) * self._spec.logits_soft_cap
        return logits

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """What the head's product reads for `inputs.logit_rows`: [R, hidden_size] float32."""
        step = self._decode(inputs, kv)
        *before, product = self._spec.head_ops
        assert isinstance(product, Linear)
        for op in before:
            step.run(op)
        return step.buffers[product.x].float()

    def _decode(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> _Step:
        """All ops but the head's; "hidden" then holds the picked rows only."""
        step = _Step(self._tensors, self._attention, inputs, kv)
        for rope, inv_freq in self._inv_freqs.items():
            step.rotations[rope] = _rotation(inv_freq, rope.attention_scaling, inputs.positions)
        for op in self._spec.ops:
            step.run(op)
        step.buffers["hidden"] = step.buffers["hidden"].index_select(0, inputs.logit_rows)
        return step


class _Step:
    """The buffers of one forward, and one method an op."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        attention: AttentionBackend,
        inputs: StepInputs,
        kv: Sequence[LayerKV],
    ) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.rotations: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._tensors = tensors
        self._attention = attention
        self._inputs = inputs
        self._kv = kv

    def run(self, op: Op) -> None:
        match op:
            case Linear():
                self._linear(op)
            case RMSNorm():
                self.buffers[op.out] = _rms_norm(
                    self.buffers[op.x], self._tensors[op.weight], op.eps, op.weight_offset
                )
            case Attention():
                self._attend(op)
            case GatedActivation():
                self._gate(op)
            case Embed():
                rows = functional.embedding(self._inputs.input_ids, self._tensors[op.table])
                self.buffers[op.out] = rows if op.scale == 1.0 else rows * op.scale

    def _linear(self, op: Linear) -> None:
        bias = None if op.bias is None else self._tensors[op.bias]
        product = functional.linear(self.buffers[op.x], self._tensors[op.weight], bias)
        if op.accumulate:
            self.buffers[op.out].add_(product)
        else:
            self.buffers[op.out] = product

    def _gate(self, op: GatedActivation) -> None:
        gate, up = self.buffers[op.x].chunk(2, dim=-1)
        if op.kind == "silu":
            self.buffers[op.out] = functional.silu(gate).mul_(up)
        else:
            self.buffers[op.out] = functional.gelu(gate, approximate="tanh").mul_(up)

    def _attend(self, op: Attention) -> None:
        shape = op.shape
        num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
        qkv = self.buffers[op.qkv].view(-1, num_heads + 2 * num_kv_heads, shape.head_dim)
        if op.q_norm is None and op.k_norm is None:
            qk = qkv[:, : num_heads + num_kv_heads]
            qk = qk if op.rope is None else _rotate(qk, *self.rotations[op.rope])
            queries, keys = qk[:, :num_heads], qk[:, num_heads:]
        else:
            queries = self._norm_and_rotate(qkv[:, :num_heads], op.q_norm, op)
            keys = self._norm_and_rotate(
                qkv[:, num_heads : num_heads + num_kv_heads], op.k_norm, op
            )
        kv = self._kv[op.layer]
        self._attention.write_kv(keys, qkv[:, num_heads + num_kv_heads :], kv, self._inputs)
        attended = self._attention.forward(queries, kv, self._inputs, shape)
        self.buffers[op.out] = attended.flatten(1)

    def _norm_and_rotate(self, x: Tensor, norm: str | None, op: Attention) -> Tensor:
        if norm is not None:
            x = _rms_norm(x, self._tensors[norm], op.norm_eps, op.norm_weight_offset)
        return x if op.rope is None else _rotate(x, *self.rotations[op.rope])


def _rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """Over the last axis, in fp32 whatever the dtype of x."""
    scale = weight.float()
    scale = scale if weight_offset == 0.0 else scale + weight_offset
    return functional.rms_norm(x.float(), scale.shape, scale, eps).to(x.dtype)


def _rotation(inv_freq: Tensor, scaling: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin, each [T, 1, head_dim] fp32; sin is negated for the first half."""
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, head_dim], halves paired (NeoX): (a, b) -> (a cos - b sin, b cos + a sin)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
