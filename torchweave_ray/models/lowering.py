"""A DecoderSpec as native code: ops with their weights packed, and the buffers between them.

The residual stream and what products give are fp32, what products read is bf16, or blocks of 8 bits
where their weight is quantised; sums are fp32.
Knows the kernels' ops, not how they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels import structs
from torchweave_ray.kernels.packing import PackedLinear, pack_bias, pack_norm
from torchweave_ray.kernels.program import Code, RopeTable
from torchweave_ray.models.emitter import CannotLower, Emitter, address
from torchweave_ray.models.expert_lowering import lower_experts
from torchweave_ray.models.spec import (
    Attention,
    DecoderSpec,
    Embed,
    Experts,
    GatedActivation,
    Linear,
    RMSNorm,
    Rope,
)
from torchweave_ray.models.spec import Op as SpecOp


@dataclass(frozen=True, slots=True)
class Lowered:
    code: Code
    """Its last op is the head's product."""
    logits: int
    """Slot of the logits [R, vocab] fp32."""
    head_input: int
    """Slot of the last norm's output [R, hidden_size] bf16."""
    num_hidden_ops: int
    """So many ops fill it."""
    tensors: Mapping[str, Tensor | PackedLinear]
    """Those that it was made of, packed: to be lowered again."""


def lower(
    spec: DecoderSpec,
    tensors: Mapping[str, Tensor | PackedLinear],
    targets: Sequence[str] = (),
    max_rank: int = 0,
) -> Lowered:
    """Weights that come packed are used where they lie, the others are packed here.

    `targets`: weights to which LoRA adapters may add, of at most `max_rank` stacked rows; what
    rows without an adapter get stays the same to the bit. Raises CannotLower, or ArtifactError
    naming a tensor that is missing.
    """
    if missing := sorted(set(spec.tensors) - set(tensors)):
        raise ArtifactError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    to = Emitter(tensors)
    lowering = _Lowering(spec, to, {name: i for i, name in enumerate(targets)}, max_rank)
    lowering.add_all(spec.ops)
    to.pick_rows()
    lowering.add_all(spec.head_ops[:-1])
    num_hidden_ops = len(to.ops)
    lowering.add_all(spec.head_ops[-1:])
    code = Code(tuple(to.ops), tuple(to.buffers), tuple(to.ropes), tuple(to.kept))
    head = spec.head_ops[-1]
    if not isinstance(head, Linear):
        raise CannotLower("the head does not end in a product")
    packed = {name: weight for (name, _), weight in to.packed.items()}
    slots = to.slot(head.out), to.slot(head.x)
    return Lowered(code, *slots, num_hidden_ops, {**tensors, **packed})


@dataclass(slots=True)
class _Lowering:
    spec: DecoderSpec
    to: Emitter
    targets: Mapping[str, int]
    """Index of each weight that adapters add to."""
    max_rank: int

    def add_all(self, ops: Sequence[SpecOp]) -> None:
        """A product and the activation behind it become one op."""
        left = list(ops)
        while left:
            match left.pop(0):
                case Linear() as op:
                    gate = left[0] if left else None
                    if isinstance(gate, GatedActivation) and gate.x == op.out:
                        self._linear(op, gate)
                        left.pop(0)
                    else:
                        self._linear(op)
                case RMSNorm() as op:
                    self._rms_norm(op, left)
                case Attention() as op:
                    self._attention(op)
                case Embed() as op:
                    self._embed(op)
                case Experts() as op:
                    lower_experts(self.to, op)
                case GatedActivation():
                    raise CannotLower("an activation that does not follow its product")

    def _embed(self, op: Embed) -> None:
        """A table that the head multiplies with, too, is kept in the head's layout only."""
        is_packed = any(isinstance(o, Linear) and o.weight == op.table for o in self.spec.head_ops)
        where: dict[str, int | None] = {}
        if is_packed or self.to.is_quantized(op.table):
            packed = self.to.pack(op.table)
            columns, where = packed.k, address(packed)
        else:
            table = self.to.plain(op.table)
            if table.dtype != torch.bfloat16:
                raise CannotLower(f"{op.table} is {table.dtype}, not bfloat16")
            columns, where = table.shape[1], {"weight": self.to.keep(table.contiguous())}
        out = self.to.new(op.out, columns, torch.float32)
        mode = structs.PACKED if is_packed else structs.ROW_MAJOR
        self.to.emit(structs.EMBED, out, out, mode=mode, k=columns, scale=op.scale, **where)

    def _rms_norm(self, op: RMSNorm, rest: Sequence[SpecOp]) -> None:
        """Straight to blocks where the next op reads them and nothing else the values: `hidden` is
        asked for those of the head."""
        x = self.to.read(op.x, torch.float32)
        columns = self.to.buffers[x].columns
        weight = self.to.keep(pack_norm(self.to.plain(op.weight), op.weight_offset))
        fields = {"n": columns, "eps": op.eps, "weight": weight}
        if op.accumulate:
            total = self.to.read(op.out, torch.float32)
            self.to.emit(structs.RMS_NORM, x, total, mode=structs.NORM_ADD, **fields)
            return
        out = self.to.new(op.out, columns, torch.bfloat16)
        self.to.blocks.pop(out, None)
        if not self.to.picked and self._only_products_read(op.out, rest):
            if self.targets:  # adapters read the values
                self.to.emit(structs.RMS_NORM, x, out, **fields)
            blocks = self.to.new(f"blocks of {out}", columns, torch.uint8)
            self.to.emit(structs.RMS_NORM, x, blocks, mode=structs.NORM_BLOCKS, **fields)
            self.to.blocks[out] = blocks
        else:
            self.to.emit(structs.RMS_NORM, x, out, **fields)

    def _only_products_read(self, name: str, rest: Sequence[SpecOp]) -> bool:
        """Whether whatever reads it before it is written again multiplies quantised weights."""
        for op in rest:
            reads = op.qkv if isinstance(op, Attention) else None if isinstance(op, Embed) else op.x
            if reads == name and not (isinstance(op, Linear) and self.to.is_quantized(op.weight)):
                return False
            if op.out == name:
                break
        return True

    def _linear(self, op: Linear, gate: GatedActivation | None = None) -> None:
        values = x = self.to.read(op.x, torch.bfloat16)
        packed = self.to.pack(op.weight, gate is not None)
        n, k = packed.n, packed.k
        num_rows, where = packed.data.shape[0] * structs.PANEL, address(packed)
        if packed.format != "bf16":
            x = self.to.quantized(x)
        target = self.targets.get(op.weight)
        if gate is not None and target is None:
            mode, out = self._activation(gate), self.to.new(gate.out, n // 2, torch.bfloat16)
        elif gate is not None:
            mode, out = structs.STORE_F32, self.to.new(op.out, num_rows, torch.float32)
        elif op.accumulate:
            mode, out = structs.ADD_F32, self.to.read(op.out, torch.float32)
        else:
            mode, out = structs.STORE_F32, self.to.new(op.out, n, torch.float32)
        bias = None
        if op.bias is not None:
            bias = self.to.keep(pack_bias(self.to.plain(op.bias), gate is not None))
        self.to.emit(structs.LINEAR, x, out, mode=mode, n=num_rows, k=k, extra=bias, **where)
        if target is None:
            return
        shrunk = self.to.new("shrunk", self.max_rank, torch.bfloat16)
        narrow = {"mode": structs.STORE_BF16, "n": self.max_rank, "k": k, "target": target}
        self.to.emit(structs.SHRINK, values, shrunk, **narrow)
        wide = {"mode": structs.ADD_F32, "n": num_rows, "target": target}
        self.to.emit(structs.EXPAND, shrunk, out, **wide)
        if gate is not None:
            gated = self.to.new(gate.out, n // 2, torch.bfloat16)
            mode = self._activation(gate)
            self.to.emit(structs.ACTIVATE, out, gated, mode=mode, n=num_rows)

    def _activation(self, gate: GatedActivation) -> int:
        return structs.SILU if gate.kind == "silu" else structs.GELU

    def _attention(self, op: Attention) -> None:
        shape = op.shape
        if shape.head_dim % 16 or shape.head_dim > structs.MAX_HEAD_DIM:
            raise CannotLower(
                f"head_dim {shape.head_dim} is not a multiple of 16 up to {structs.MAX_HEAD_DIM}"
            )
        spec = self.spec
        if (shape.num_kv_heads, shape.head_dim) != (spec.num_kv_heads, spec.head_dim):
            raise CannotLower("layers have attention of different shapes")
        qkv = self.to.read(op.qkv, torch.float32)
        columns = shape.num_heads * shape.head_dim
        queries = self.to.new(f"queries of {op.qkv}", columns, torch.bfloat16)
        out = self.to.new(op.out, columns, torch.bfloat16)
        heads: dict[str, int] = {
            "layer": op.layer,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "window": shape.sliding_window or 0,
        }
        norms = {"weight": self._norm(op, op.q_norm), "extra": self._norm(op, op.k_norm)}
        rope, turns = (-1, 0) if op.rope is None else self._rope(op.rope)
        turning = {"rope": rope, "rotary_dim": turns, "eps": op.norm_eps}
        self.to.emit(structs.ROPE_KV, qkv, queries, **turning, **heads, **norms)
        scores = {"scale": shape.scale, "soft_cap": shape.soft_cap or 0.0}
        self.to.emit(structs.ATTEND, queries, out, **heads, **scores)
        self.to.emit(structs.MERGE, queries, out, **heads, **scores)

    def _norm(self, op: Attention, name: str | None) -> int | None:
        if name is None:
            return None
        return self.to.keep(pack_norm(self.to.plain(name), op.norm_weight_offset))

    def _rope(self, rope: Rope) -> tuple[int, int]:
        """Slot of its table, and how many dimensions of a head turn."""
        table, turns = RopeTable(rope.inv_freq, rope.attention_scaling), 2 * len(rope.inv_freq)
        if turns % 16:
            raise CannotLower(f"{turns} dimensions of a head turn, no multiple of 16")
        if table not in self.to.ropes:
            if len(self.to.ropes) == structs.MAX_ROPES:
                raise CannotLower(f"more than {structs.MAX_ROPES} kinds of rope")
            self.to.ropes.append(table)
        return self.to.ropes.index(table), turns
