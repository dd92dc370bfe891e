"""The executor of any device: a DecoderSpec run op by op, in fp32 or bf16.

Owns the weights. Arithmetic, attention and the KV cache are somebody else's; with plain torch's
it is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from torchweave_ray.attention.base import AttentionBackend, HeadNorms, LayerKV, StepInputs
from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.quantization import dequantize
from torchweave_ray.models.lora.fitted import FittedAdapter, LoraPair
from torchweave_ray.models.ops import Ops, Rotation, TorchOps, Weight, rotation_of
from torchweave_ray.models.spec import (
    Attention,
    DecoderSpec,
    Embed,
    Experts,
    GatedActivation,
    Linear,
    Op,
    Ranks,
    RMSNorm,
    Rope,
)


class TorchExecutor:
    """An `Adaptable`. `tensors` hold what `spec.tensors` names, all of one dtype and device."""

    def __init__(
        self,
        spec: DecoderSpec,
        tensors: Mapping[str, Weight],
        attention: AttentionBackend,
        ops: Ops | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`ops`: None: plain torch's. `ranks`: where `spec` is a slice. Raises ArtifactError naming
        a tensor that is missing or that no op uses."""
        if missing := sorted(set(spec.tensors) - set(tensors)):
            raise ArtifactError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
        if surplus := sorted(set(tensors) - set(spec.tensors)):
            raise ArtifactError(f"tensor {surplus[0]} is used by no op ({len(surplus)} in all)")
        self._spec = spec
        self._tensors = tensors
        self._attention = attention
        self._ops = ops or TorchOps(attention)
        self._ranks = ranks
        self.name = self._ops.name
        self._like = next(each for each in tensors.values() if isinstance(each, Tensor))
        device = self._like.device
        ropes = {op.rope for op in spec.ops if isinstance(op, Attention) and op.rope is not None}
        self._inv_freqs = {rope: torch.tensor(rope.inv_freq, device=device) for rope in ropes}

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`: [R, vocab_size] float32; of ranks beside 0 their own."""
        step = self._decode(inputs, kv)
        step.run_all(self._spec.head_ops)
        logits = step.buffers["logits"]
        if self._ranks is not None:
            logits = self._ranks.gather_columns(logits)[:, : self._spec.vocab_size].contiguous()
        logits = logits.float()
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
        return {
            name: LoraPair(
                *(each.to(self._like.device, self._like.dtype) for each in (pair.a, pair.b))
            )
            for name, pair in adapter.pairs.items()
        }

    def begin(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> TorchStep:
        """A step before its first op, for callers that run and watch the ops one by one."""
        dtype = self._like.dtype
        step = TorchStep(self._tensors, self._attention, self._ops, inputs, kv, dtype, self._ranks)
        for rope, inv_freq in self._inv_freqs.items():
            step.rotations[rope] = rotation_of(inv_freq, rope.attention_scaling, inputs.positions)
        return step

    def _decode(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> TorchStep:
        """All ops but the head's; "hidden" then holds the picked rows only."""
        step = self.begin(inputs, kv)
        step.run_all(self._spec.ops)
        step.buffers["hidden"] = step.buffers["hidden"].index_select(0, inputs.logit_rows)
        return step


class TorchStep:
    """The buffers of one forward, and one method an op."""

    def __init__(
        self,
        tensors: Mapping[str, Weight],
        attention: AttentionBackend,
        ops: Ops,
        inputs: StepInputs,
        kv: Sequence[LayerKV],
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.rotations: dict[Rope, Rotation] = {}
        self._weights = tensors
        self._attention = attention
        self._ops = ops
        self._inputs = inputs
        self._kv = kv
        self._dtype = dtype
        self._ranks = ranks

    def run_all(self, ops: Sequence[Op]) -> None:
        """In order; an add to a buffer and the norm of it that follows are one."""
        added: Linear | None = None
        for op, following in zip_longest(ops, ops[1:]):
            if added is not None:
                assert isinstance(op, RMSNorm)
                self._add_norm(self._product(added), op)
                added = None
            elif _adds_before_norm(op, following):
                added = op
            else:
                self.run(op)

    def run(self, op: Op) -> None:
        match op:
            case Linear():
                self._linear(op)
            case RMSNorm():
                self._norm(op)
            case Attention():
                self._attend(op)
            case GatedActivation():
                self.buffers[op.out] = self._ops.gated(self.buffers[op.x], op.kind)
            case Experts():
                self._mix(op)
            case Embed():
                rows = self._embed(op)
                self.buffers[op.out] = rows if op.scale == 1.0 else rows * op.scale

    def _embed(self, op: Embed) -> Tensor:
        if op.first_row is None:
            return self._rows_of(op.table, self._inputs.input_ids)
        ids = self._inputs.input_ids - op.first_row
        table = self._weights[op.table]
        num_rows = table.shape[0] if isinstance(table, Tensor) else table.n
        is_own = (ids >= 0) & (ids < num_rows)
        rows = self._rows_of(op.table, ids.where(is_own, 0)).masked_fill_(~is_own[:, None], 0.0)
        self._sum(rows)
        return rows

    def _rows_of(self, name: str, ids: Tensor) -> Tensor:
        table = self._weights[name]
        if isinstance(table, Tensor):
            return functional.embedding(ids, table)
        return dequantize(table.rows(ids)).to(self._dtype)

    def _sum(self, x: Tensor) -> None:
        assert self._ranks is not None, "a slice of a decoder runs among its ranks"
        self._ranks.sum(x)

    def _linear(self, op: Linear) -> None:
        product = self._product(op)
        if op.accumulate:
            self.buffers[op.out].add_(product)
        else:
            self.buffers[op.out] = product

    def _product(self, op: Linear) -> Tensor:
        bias = None if op.bias is None else self._tensor(op.bias)
        if op.is_partial:
            product = self._ops.linear(self.buffers[op.x], self._weights[op.weight], None)
            self._sum(product)
            return product if bias is None else product.add_(bias)
        product = self._ops.linear(self.buffers[op.x], self._weights[op.weight], bias)
        for rows in self._inputs.adapters:
            assert isinstance(rows.adapter, Mapping), "an adapter is loaded by its executor"
            if (pair := rows.adapter.get(op.weight)) is not None:
                own = slice(rows.start, rows.end)
                shrunk = self._ops.linear(self.buffers[op.x][own], pair.a, None)
                product[own] += self._ops.linear(shrunk, pair.b, None)
        return product

    def _norm(self, op: RMSNorm) -> None:
        x, weight = self.buffers[op.x], self._tensor(op.weight)
        if op.accumulate:
            self._ops.rms_norm_add(self.buffers[op.out], x, weight, op.eps, op.weight_offset)
        else:
            self.buffers[op.out] = self._ops.rms_norm(x, weight, op.eps, op.weight_offset)

    def _add_norm(self, product: Tensor, op: RMSNorm) -> None:
        weight = self._tensor(op.weight)
        self.buffers[op.out] = self._ops.add_rms_norm(
            self.buffers[op.x], product, weight, op.eps, op.weight_offset
        )

    def _mix(self, op: Experts) -> None:
        """One product an expert over all rows that chose it; then each row's, in order of rank."""
        x = self.buffers[op.x]
        gate_up = self._tensor(op.gate_up).chunk(op.num_experts)
        down = self._tensor(op.down).chunk(op.num_experts)
        shares, chosen = route(self.buffers[op.router], op.top_k, op.normalize)
        parts = x.new_empty(*chosen.shape, x.shape[1])
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, ranks = (chosen == expert).nonzero(as_tuple=True)
            both = self._ops.linear(x[rows], gate_up[expert], None)
            parts[rows, ranks] = self._ops.linear(
                self._ops.gated(both, op.kind), down[expert], None
            )
        mixed = self.buffers[op.out]
        if op.is_partial:
            mixed = torch.zeros_like(mixed)
        for rank in range(op.top_k):
            mixed.add_(parts[:, rank] * shares[:, rank, None].to(x.dtype))
        if op.is_partial:
            self._sum(mixed)
            self.buffers[op.out].add_(mixed)

    def _attend(self, op: Attention) -> None:
        shape, kv = op.shape, self._kv[op.layer]
        norms = HeadNorms(
            None if op.q_norm is None else self._tensor(op.q_norm),
            None if op.k_norm is None else self._tensor(op.k_norm),
            op.norm_eps,
            op.norm_weight_offset,
        )
        qkv = self.buffers[op.qkv].view(
            -1, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim
        )
        rotation = None if op.rope is None else self.rotations[op.rope]
        queries = self._ops.rotate_and_write(qkv, shape, rotation, norms, kv, self._inputs)
        attended = self._attention.forward(queries, kv, self._inputs, shape)
        self.buffers[op.out] = attended.flatten(1)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._weights[name]
        assert isinstance(tensor, Tensor), f"{name} is quantised, and not read by a product"
        return tensor


def _adds_before_norm(op: Op, following: Op | None) -> TypeGuard[Linear]:
    return (
        isinstance(op, Linear)
        and op.accumulate
        and isinstance(following, RMSNorm)
        and following.x == op.out
        and following.out != op.out
        and not following.accumulate
    )


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Of logits [T, num_experts]: weights [T, top_k] fp32, largest first, and whose they are."""
    shares, order = logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    shares = shares[:, :top_k]
    if normalize:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares, order[:, :top_k]
