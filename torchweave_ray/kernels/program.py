"""A linear program of native ops with the buffers they pass values through: one call a step.

Knows ops, buffers and a step's batch; which model they make up is models/lowering.py's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV, StepInputs
from torchweave_ray.kernels.kv_layout import SUB
from torchweave_ray.kernels.library import Team
from torchweave_ray.kernels.structs import (
    BLOCK_BYTES,
    MAX_BUFFERS,
    MAX_ROPES,
    PANEL,
    Lora,
    Op,
    Step,
)


@dataclass(frozen=True, slots=True)
class Buffer:
    """[rows, columns] values between ops; rows are the step's tokens, or its picked rows. uint8:
    quantised blocks of 32 columns (`TwBlock`)."""

    columns: int
    dtype: torch.dtype
    picked: bool = False
    rows_per_token: int = 1
    """Of a mixture's rows: top_k."""

    @property
    def stride(self) -> int:
        """Whole panels: products write them whole, and read pairs or groups of columns."""
        panels = -(-self.columns // PANEL)
        return panels * (BLOCK_BYTES if self.dtype == torch.uint8 else PANEL)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Angles of one kind of rotation."""

    inv_freq: tuple[float, ...]
    scaling: float = 1.0

    def rows(self, num_positions: int) -> Tensor:
        """[num_positions, 2 * len(inv_freq)] fp32: cos, then sin, times scaling."""
        positions = torch.arange(num_positions)[:, None].float()
        angles = positions * torch.tensor(self.inv_freq)
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.scaling


@dataclass(frozen=True, slots=True)
class Code:
    """What a program is made of."""

    ops: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    """By slot, as ops name them."""
    ropes: tuple[RopeTable, ...] = ()
    kept: tuple[Tensor, ...] = ()
    """The memory that ops point into."""


class Program:
    """`Code` bound to memory. Buffers grow to the largest step seen and stay."""

    def __init__(self, code: Code, team: Team) -> None:
        assert len(code.buffers) <= MAX_BUFFERS
        assert len(code.ropes) <= MAX_ROPES
        self._code = code
        self._team = team
        self._ops = (Op * len(code.ops))(*code.ops)
        self._step = Step()
        self._buffers = [torch.zeros(0, b.stride, dtype=b.dtype) for b in code.buffers]
        self._tables: list[Tensor] = [torch.zeros(0) for _ in code.ropes]
        self._kv: Sequence[LayerKV] = ()
        self._pointers: list[object] = []  # what step.keys and its like point to

    def run(
        self,
        inputs: StepInputs,
        kv: Sequence[LayerKV],
        num_ops: int | None = None,
        adapters: Sequence[ctypes.Array[Lora]] = (),
    ) -> None:
        """Run the first `num_ops` ops, or all. Results are in the buffers until the next run.

        `adapters`: the weights of each of `inputs.adapters`.
        """
        self.reserve(inputs.input_ids.shape[0], inputs.logit_rows.shape[0], inputs.max_seq_len)
        if kv is not self._kv:
            self._point_to(kv)
        step = self._step
        step.num_tokens = inputs.input_ids.shape[0]
        step.num_seqs = inputs.seq_lens.shape[0]
        step.num_rows = inputs.logit_rows.shape[0]
        step.input_ids = _address(inputs.input_ids, torch.int64)
        step.positions = _address(inputs.positions, torch.int64)
        step.slot_mapping = _address(inputs.slot_mapping, torch.int64)
        step.query_start_loc = _address(inputs.query_start_loc, torch.int32)
        step.seq_lens = _address(inputs.seq_lens, torch.int32)
        step.block_tables = _address(inputs.block_tables, torch.int32)
        step.block_table_stride = inputs.block_tables.shape[1]
        step.logit_rows = _address(inputs.logit_rows, torch.int64)
        step.num_adapters = len(adapters)
        if adapters:
            bounds = [*(rows.start for rows in inputs.adapters), step.num_tokens]
            rows = (ctypes.c_int64 * len(bounds))(*bounds)
            weights = (ctypes.c_void_p * len(adapters))(
                *(ctypes.addressof(each) for each in adapters)
            )
            step.adapter_bounds = ctypes.addressof(rows)
            step.adapters = ctypes.addressof(weights)
        self._team.run(self._ops, len(self._ops) if num_ops is None else num_ops, step)

    def buffer(self, slot: int, num_rows: int) -> Tensor:
        """A view [num_rows, columns] of what the last run left there; of blocks, all bytes."""
        buffer = self._code.buffers[slot]
        columns = buffer.stride if buffer.dtype == torch.uint8 else buffer.columns
        return self._buffers[slot][:num_rows, :columns]

    def reserve(self, num_tokens: int, num_picked: int, num_positions: int) -> None:
        """Let the buffers hold a step of this size. New memory is zeroed."""
        for slot, buffer in enumerate(self._code.buffers):
            rows = num_picked if buffer.picked else num_tokens * buffer.rows_per_token
            if rows > self._buffers[slot].shape[0]:
                self._buffers[slot] = torch.zeros(rows, buffer.stride, dtype=buffer.dtype)
                self._step.buffers[slot] = self._buffers[slot].data_ptr()
        for slot, rope in enumerate(self._code.ropes):
            if num_positions > self._tables[slot].shape[0]:
                self._tables[slot] = rope.rows(max(512, 2 * num_positions))
                self._step.ropes[slot] = self._tables[slot].data_ptr()

    def _point_to(self, kv: Sequence[LayerKV]) -> None:
        scales = [t for layer in kv for t in (layer.key_scales, layer.value_scales)]
        quantized = any(t is not None for t in scales)
        dtype = torch.int8 if quantized else torch.bfloat16
        for layer in kv:
            assert all(t.dtype == dtype and t.is_contiguous() for t in (layer.keys, layer.values))
        if quantized:
            assert all(t is not None and t.is_contiguous() for t in scales)
        self._pointers = []
        for name in ("keys", "values", "key_scales", "value_scales"):
            tensors = [getattr(layer, name) for layer in kv]
            is_there = bool(tensors) and tensors[0] is not None
            addresses = (ctypes.c_void_p * len(kv))(*(t.data_ptr() for t in tensors if is_there))
            setattr(self._step, name, ctypes.addressof(addresses) if is_there else None)
            self._pointers.append(addresses)
        groups = (ctypes.c_int32 * len(kv))(*(layer.group for layer in kv))
        self._step.kv_groups = ctypes.addressof(groups)
        self._pointers.append(groups)
        self._step.block_size = kv[0].keys.shape[2] if kv else SUB
        assert self._step.block_size % SUB == 0
        self._kv = kv


def blank_inputs(num_rows: int) -> StepInputs:
    """A batch of rows that are in no sequence, for programs without attention."""
    nothing = torch.zeros(num_rows, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int32)
    return StepInputs(
        nothing, nothing, nothing, none, none, none.view(0, 0), nothing[:0], num_rows, 0
    )


def _address(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()
