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
from torchweave_ray.models.lora.fitted import FittedAdapter, LoraPair
from torchweave_ray.models.spec import (
    Attention,
    DecoderSpec,
    Embed,
    Experts,
    GatedActivation,
    Linear,
    Op,
    RMSNorm,
    Rope,
)


class TorchExecutor:
    """An `Adaptable`. `tensors` hold what `spec.tensors` names, all of one dtype and device."""

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
        self._tensors = tensors
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

    def load_adapter(self, adapter: FittedAdapter) -> Mapping[str, LoraPair]:
        """Its matrices in the weights' dtype, beside them. Any thread may call."""
        like = next(iter(self._tensors.values()))
        return {
            name: LoraPair(*(each.to(like.device, like.dtype) for each in (pair.a, pair.b)))
            for name, pair in adapter.pairs.items()
        }

    def begin(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> TorchStep:
        """A step before its first op, for callers that run and watch the ops one by one."""
        step = TorchStep(self._tensors, self._attention, inputs, kv)
        for rope, inv_freq in self._inv_freqs.items():
            step.rotations[rope] = _rotation(inv_freq, rope.attention_scaling, inputs.positions)
        return step

    def _decode(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> TorchStep:
        """All ops but the head's; "hidden" then holds the picked rows only."""
        step = self.begin(inputs, kv)
        for op in self._spec.ops:
            step.run(op)
        step.buffers["hidden"] = step.buffers["hidden"].index_select(0, inputs.logit_rows)
        return step


class TorchStep:
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
                self._norm(op)
            case Attention():
                self._attend(op)
            case GatedActivation():
                self.buffers[op.out] = _gated(self.buffers[op.x], op.kind)
            case Experts():
                self._mix(op)
            case Embed():
                rows = functional.embedding(self._inputs.input_ids, self._tensors[op.table])
                self.buffers[op.out] = rows if op.scale == 1.0 else rows * op.scale

    def _linear(self, op: Linear) -> None:
        bias = None if op.bias is None else self._tensors[op.bias]
        product = functional.linear(self.buffers[op.x], self._tensors[op.weight], bias)
        for rows in self._inputs.adapters:
            assert isinstance(rows.adapter, Mapping), "an adapter is loaded by its executor"
            if (pair := rows.adapter.get(op.weight)) is not None:
                own = slice(rows.start, rows.end)
                shrunk = functional.linear(self.buffers[op.x][own], pair.a)
                product[own] += functional.linear(shrunk, pair.b)
        if op.accumulate:
            self.buffers[op.out].add_(product)
        else:
            self.buffers[op.out] = product

    def _norm(self, op: RMSNorm) -> None:
        x, weight = self.buffers[op.x], self._tensors[op.weight]
        normed = _rms_norm(x, weight, op.eps, op.weight_offset)
        if op.accumulate:
            self.buffers[op.out].add_(normed)
        else:
            self.buffers[op.out] = normed

    def _mix(self, op: Experts) -> None:
        """One product an expert over all rows that chose it; then each row's, in order of rank."""
        x = self.buffers[op.x]
        gate_up = self._tensors[op.gate_up].chunk(op.num_experts)
        down = self._tensors[op.down].chunk(op.num_experts)
        shares, chosen = route(self.buffers[op.router], op.top_k, op.normalize)
        parts = x.new_empty(*chosen.shape, x.shape[1])
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, ranks = (chosen == expert).nonzero(as_tuple=True)
            gated = _gated(functional.linear(x[rows], gate_up[expert]), op.kind)
            parts[rows, ranks] = functional.linear(gated, down[expert])
        for rank in range(op.top_k):
            self.buffers[op.out].add_(parts[:, rank] * shares[:, rank, None].to(x.dtype))

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


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Of logits [T, num_experts]: weights [T, top_k] fp32, largest first, and whose they are."""
    shares, order = logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    shares = shares[:, :top_k]
    if normalize:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares, order[:, :top_k]


def _gated(x: Tensor, kind: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    if kind == "silu":
        return functional.silu(gate).mul_(up)
    return functional.gelu(gate, approximate="tanh").mul_(up)


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
    """[T, heads, head_dim], halves paired (NeoX): (a, b) -> (a cos - b sin, b cos + a sin).
    Only the first dimensions turn where cos has fewer than x."""
    if (dim := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((_rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
