"""Native ops as they are appended: buffers by name, packed weights, and the memory they point to.

Knows the kernels' buffers and fields, not what a model's ops mean: that is lowering.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchweave_ray.kernels import structs
from torchweave_ray.kernels.arena import Arena
from torchweave_ray.kernels.packing import PackedLinear, pack_linear
from torchweave_ray.kernels.program import Buffer, RopeTable
from torchweave_ray.kernels.structs import Op

HIDDEN = "hidden"


class CannotLower(Exception):
    """The native kernels have no way to run this spec; the message says what stands against it."""


@dataclass(slots=True)
class Emitter:
    """A program so far."""

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

    def slot(self, name: str) -> int:
        if name not in self.slots:
            raise CannotLower(f"buffer {name!r} is read before it is written")
        return self.slots[name]

    def pick_rows(self) -> None:
        x = self.slot(HIDDEN)
        self.picked = True
        self.slots.clear()
        self.blocks.clear()
        out = self.new(HIDDEN, self.buffers[x].columns, torch.float32)
        self.emit(structs.PICK, x, out)

    def new(self, name: str, columns: int, dtype: torch.dtype, rows_per_token: int = 1) -> int:
        """Slot of a buffer to write."""
        buffer = Buffer(columns, dtype, self.picked, rows_per_token)
        if name in self.slots and self.buffers[self.slots[name]] == buffer:
            return self.slots[name]
        self.slots[name] = len(self.buffers)
        self.buffers.append(buffer)
        if len(self.buffers) > structs.MAX_BUFFERS:
            raise CannotLower(f"more than {structs.MAX_BUFFERS} buffers")
        return self.slots[name]

    def read(self, name: str, dtype: torch.dtype) -> int:
        slot = self.slot(name)
        if self.buffers[slot].dtype != dtype:
            raise CannotLower(f"buffer {name!r} is {self.buffers[slot].dtype}, not {dtype}")
        return slot

    def quantized(self, x: int) -> int:
        """Slot of the blocks of what is in slot x, made by a pass of their own if need be."""
        if x not in self.blocks:
            columns, num = self.buffers[x].columns, self.buffers[x].rows_per_token
            out = self.new(f"blocks of {x}", columns, torch.uint8, num)
            self.emit(structs.QUANTIZE, x, out, k=columns, spread=int(num > 1), top_k=num)
            self.blocks[x] = out
        return self.blocks[x]

    def emit(self, kind: int, x: int, out: int, **fields: float | int | None) -> None:
        self.blocks.pop(out, None)
        op = Op(kind=kind, picked=int(self.picked), x=x, out=out, rope=-1)
        op.ldx, op.ldo = self.buffers[x].stride, self.buffers[out].stride
        for name, value in fields.items():
            setattr(op, name, value)
        self.ops.append(op)

    def keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def plain(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if isinstance(tensor, PackedLinear):
            raise CannotLower(f"{name} is packed, and no product multiplies with it")
        return tensor

    def pack(self, name: str, gated: bool = False, num_experts: int = 1) -> PackedLinear:
        """A weight as it is multiplied with; packed here, once, unless it came so."""
        if (name, gated) not in self.packed:
            weight = self.tensors[name]
            if isinstance(weight, Tensor):
                if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
                    held = f"{weight.dtype} on {weight.device}"
                    raise CannotLower(f"{name} is {held}, not bfloat16 on cpu")
                weight = pack_linear(weight, gated, num_experts)
                weight = replace(weight, data=self.arena.place(weight.data))
            elif weight.gated != gated:
                raise CannotLower(f"{name} is packed {'without' if gated else 'with'} gates")
            self.packed[name, gated] = weight
            self.kept.append(weight.data)
            if weight.scales is not None:
                self.kept.append(weight.scales)
        return self.packed[name, gated]

    def is_quantized(self, name: str) -> bool:
        weight = self.tensors[name]
        return isinstance(weight, PackedLinear) and weight.format != "bf16"


def address(weight: PackedLinear) -> dict[str, int | None]:
    """Fields of an op that reads a packed weight."""
    return {
        "format": structs.FORMATS[weight.format],
        "weight": weight.data.data_ptr(),
        "scales": None if weight.scales is None else weight.scales.data_ptr(),
    }
