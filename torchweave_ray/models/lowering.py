"""A DecoderSpec as native code: ops with their weights packed, and the buffers between them.

The residual stream and what products give are fp32, what products read is bf16, or blocks of 8 bits
where their weight is quantised; sums are fp32.
Knows the kernels' ops, not how they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels import structs
from torchweave_ray.kernels.arena import Arena
from torchweave_ray.kernels.packing import PackedLinear, pack_bias, pack_linear, pack_norm
from torchweave_ray.kernels.program import Buffer, Code, RopeTable
from torchweave_ray.kernels.structs import Op
from torchweave_ray.models.spec import (
    Attention,
    DecoderSpec,
    Embed,
    GatedActivation,
    Linear,
    RMSNorm,
    Rope,
)
from torchweave_ray.models.spec import Op as SpecOp

HIDDEN = "hidden"


class CannotLower(Exception):
    """The native kernels have no way to run this spec; the message says what stands against it."""


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


def lower(spec: DecoderSpec, tensors: Mapping[str, Tensor | PackedLinear]) -> Lowered:
    """Weights that come packed are used where they lie, the others are packed here.

    Raises CannotLower, or ArtifactError naming a tensor that is missing.
    """
    if missing := sorted(set(spec.tensors) - set(tensors)):
        raise ArtifactError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    lowering = _Lowering(spec, tensors)
    lowering.add_all(spec.ops)
    lowering.pick_rows()
    lowering.add_all(spec.head_ops[:-1])
    num_hidden_ops = len(lowering.ops)
    lowering.add_all(spec.head_ops[-1:])
    code = Code(
        tuple(lowering.ops),
        tuple(lowering.buffers),
        tuple(lowering.ropes),
        tuple(lowering.kept),
    )
    head = spec.head_ops[-1]
    if not isinstance(head, Linear):
        raise CannotLower("the head does not end in a product")
    return Lowered(code, lowering.slot(head.out), lowering.slot(head.x), num_hidden_ops)


@dataclass(slots=True)
class _Lowering:
    spec: DecoderSpec
    tensors: Mapping[str, Tensor | PackedLinear]
    ops: list[Op] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    ropes: list[RopeTable] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)
    """By name of the spec's buffer; a name of another shape or domain gets a new slot."""
    packed: dict[tuple[str, bool], PackedLinear] = field(default_factory=dict)
    arena: Arena = field(default_factory=Arena)
    picked: bool = False
    blocks: dict[int, int] = field(default_factory=dict)
    """Slot of the quantised blocks that hold the same as a slot; until that is written again."""

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
                case GatedActivation():
                    raise CannotLower("an activation that does not follow its product")

    def slot(self, name: str) -> int:
        if name not in self.slots:
            raise CannotLower(f"buffer {name!r} is read before it is written")
        return self.slots[name]

    def pick_rows(self) -> None:
        x = self.slot(HIDDEN)
        self.picked = True
        self.slots.clear()
        self.blocks.clear()
        out = self._new(HIDDEN, self.buffers[x].columns, torch.float32)
        self._emit(structs.PICK, x, out)

    def _new(self, name: str, columns: int, dtype: torch.dtype) -> int:
        buffer = Buffer(columns, dtype, self.picked)
        if name in self.slots and self.buffers[self.slots[name]] == buffer:
            return self.slots[name]
        self.slots[name] = len(self.buffers)
        self.buffers.append(buffer)
        if len(self.buffers) > structs.MAX_BUFFERS:
            raise CannotLower(f"more than {structs.MAX_BUFFERS} buffers")
        return self.slots[name]

    def _read(self, name: str, dtype: torch.dtype) -> int:
        slot = self.slot(name)
        if self.buffers[slot].dtype != dtype:
            raise CannotLower(f"buffer {name!r} is {self.buffers[slot].dtype}, not {dtype}")
        return slot

    def _quantized(self, x: int) -> int:
        """Slot of the blocks of what is in slot x, made by a pass of their own if need be."""
        if x not in self.blocks:
            columns = self.buffers[x].columns
            out = self._new(f"blocks of {x}", columns, torch.uint8)
            self._emit(structs.QUANTIZE, x, out, k=columns)
            self.blocks[x] = out
        return self.blocks[x]

    def _emit(self, kind: int, x: int, out: int, **fields: float | int | None) -> None:
        self.blocks.pop(out, None)
        op = Op(kind=kind, picked=int(self.picked), x=x, out=out, rope=-1)
        op.ldx, op.ldo = self.buffers[x].stride, self.buffers[out].stride
        for name, value in fields.items():
            setattr(op, name, value)
        self.ops.append(op)

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _plain(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if isinstance(tensor, PackedLinear):
            raise CannotLower(f"{name} is packed, and no product multiplies with it")
        return tensor

    def _pack(self, name: str, gated: bool = False) -> PackedLinear:
        if (name, gated) not in self.packed:
            weight = self.tensors[name]
            if isinstance(weight, Tensor):
                if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
                    held = f"{weight.dtype} on {weight.device}"
                    raise CannotLower(f"{name} is {held}, not bfloat16 on cpu")
                weight = pack_linear(weight, gated)
                weight = replace(weight, data=self.arena.place(weight.data))
            elif weight.gated != gated:
                raise CannotLower(f"{name} is packed {'without' if gated else 'with'} gates")
            self.packed[name, gated] = weight
            self.kept.append(weight.data)
            if weight.scales is not None:
                self.kept.append(weight.scales)
        return self.packed[name, gated]

    def _is_quantized(self, name: str) -> bool:
        weight = self.tensors[name]
        return isinstance(weight, PackedLinear) and weight.format != "bf16"

    def _embed(self, op: Embed) -> None:
        """A table that the head multiplies with, too, is kept in the head's layout only."""
        is_packed = any(isinstance(o, Linear) and o.weight == op.table for o in self.spec.head_ops)
        where: dict[str, int | None] = {}
        if is_packed or self._is_quantized(op.table):
            packed = self._pack(op.table)
            columns, where = packed.k, _address(packed)
        else:
            table = self._plain(op.table)
            if table.dtype != torch.bfloat16:
                raise CannotLower(f"{op.table} is {table.dtype}, not bfloat16")
            columns, where = table.shape[1], {"weight": self._keep(table.contiguous())}
        out = self._new(op.out, columns, torch.float32)
        mode = structs.PACKED if is_packed else structs.ROW_MAJOR
        self._emit(structs.EMBED, out, out, mode=mode, k=columns, scale=op.scale, **where)

    def _rms_norm(self, op: RMSNorm, rest: Sequence[SpecOp]) -> None:
        """Straight to blocks where the next op reads them and nothing else the values: `hidden` is
        asked for those of the head."""
        x = self._read(op.x, torch.float32)
        columns = self.buffers[x].columns
        weight = self._keep(pack_norm(self._plain(op.weight), op.weight_offset))
        fields = {"n": columns, "eps": op.eps, "weight": weight}
        out = self._new(op.out, columns, torch.bfloat16)
        self.blocks.pop(out, None)
        if not self.picked and self._only_products_read(op.out, rest):
            blocks = self._new(f"blocks of {out}", columns, torch.uint8)
            self._emit(structs.RMS_NORM, x, blocks, mode=structs.NORM_BLOCKS, **fields)
            self.blocks[out] = blocks
        else:
            self._emit(structs.RMS_NORM, x, out, **fields)

    def _only_products_read(self, name: str, rest: Sequence[SpecOp]) -> bool:
        """Whether whatever reads it before it is written again multiplies quantised weights."""
        for op in rest:
            reads = op.qkv if isinstance(op, Attention) else None if isinstance(op, Embed) else op.x
            if reads == name and not (isinstance(op, Linear) and self._is_quantized(op.weight)):
                return False
            if op.out == name:
                break
        return True

    def _linear(self, op: Linear, gate: GatedActivation | None = None) -> None:
        x = self._read(op.x, torch.bfloat16)
        packed = self._pack(op.weight, gate is not None)
        n, k = packed.n, packed.k
        if packed.format != "bf16":
            x = self._quantized(x)
        if gate is not None:
            mode = structs.SILU if gate.kind == "silu" else structs.GELU
            out = self._new(gate.out, n // 2, torch.bfloat16)
        elif op.accumulate:
            mode, out = structs.ADD_F32, self._read(op.out, torch.float32)
        else:
            mode, out = structs.STORE_F32, self._new(op.out, n, torch.float32)
        bias = None
        if op.bias is not None:
            bias = self._keep(pack_bias(self._plain(op.bias), gate is not None))
        num_rows, where = packed.data.shape[0] * structs.PANEL, _address(packed)
        self._emit(structs.LINEAR, x, out, mode=mode, n=num_rows, k=k, extra=bias, **where)

    def _attention(self, op: Attention) -> None:
        shape = op.shape
        if shape.head_dim % 16 or shape.head_dim > structs.MAX_HEAD_DIM:
            raise CannotLower(
                f"head_dim {shape.head_dim} is not a multiple of 16 up to {structs.MAX_HEAD_DIM}"
            )
        spec = self.spec
        if (shape.num_kv_heads, shape.head_dim) != (spec.num_kv_heads, spec.head_dim):
            raise CannotLower("layers have attention of different shapes")
        qkv = self._read(op.qkv, torch.float32)
        columns = shape.num_heads * shape.head_dim
        queries = self._new(f"queries of {op.qkv}", columns, torch.bfloat16)
        out = self._new(op.out, columns, torch.bfloat16)
        heads: dict[str, int] = {
            "layer": op.layer,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "window": shape.sliding_window or 0,
        }
        norms = {"weight": self._norm(op, op.q_norm), "extra": self._norm(op, op.k_norm)}
        rope = -1 if op.rope is None else self._rope(op.rope)
        self._emit(structs.ROPE_KV, qkv, queries, rope=rope, eps=op.norm_eps, **heads, **norms)
        scores = {"scale": shape.scale, "soft_cap": shape.soft_cap or 0.0}
        self._emit(structs.ATTEND, queries, out, **heads, **scores)
        self._emit(structs.MERGE, queries, out, **heads, **scores)

    def _norm(self, op: Attention, name: str | None) -> int | None:
        if name is None:
            return None
        return self._keep(pack_norm(self._plain(name), op.norm_weight_offset))

    def _rope(self, rope: Rope) -> int:
        table = RopeTable(rope.inv_freq, rope.attention_scaling)
        if table not in self.ropes:
            if len(self.ropes) == structs.MAX_ROPES:
                raise CannotLower(f"more than {structs.MAX_ROPES} kinds of rope")
            self.ropes.append(table)
        return self.ropes.index(table)


def _address(weight: PackedLinear) -> dict[str, int | None]:
    """Fields of an op that reads a packed weight."""
    return {
        "format": structs.FORMATS[weight.format],
        "weight": weight.data.data_ptr(),
        "scales": None if weight.scales is None else weight.scales.data_ptr(),
    }
