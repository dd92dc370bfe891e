"""Each CPU kernel as a function of tensors, for comparing and measuring: a program of one op.

The signatures are those of `twin`, where they are described.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchweave_ray.attention.base import AttentionShape, LayerKV, StepInputs
from torchweave_ray.kernels import structs
from torchweave_ray.kernels.library import Team
from torchweave_ray.kernels.packing import PackedLinear, pack_bias, pack_norm
from torchweave_ray.kernels.program import Buffer, Code, Program, RopeTable, blank_inputs
from torchweave_ray.kernels.quantization import QuantizedRows
from torchweave_ray.kernels.structs import Op
from torchweave_ray.kernels.twin import Activation


class NativeOps:
    """The kernels on a team of threads."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def embed(self, input_ids: Tensor, table: Tensor | PackedLinear, scale: float = 1.0) -> Tensor:
        is_packed = isinstance(table, PackedLinear)
        weight = table.data if isinstance(table, PackedLinear) else table.contiguous()
        columns = table.k if isinstance(table, PackedLinear) else table.shape[1]
        op = Op(
            kind=structs.EMBED,
            mode=structs.PACKED if is_packed else structs.ROW_MAJOR,
            k=columns,
            scale=scale,
            weight=weight.data_ptr(),
        )
        kept: tuple[Tensor, ...] = (weight,)
        if isinstance(table, PackedLinear):
            kept = _set_weight(op, table)
        inputs = replace(blank_inputs(len(input_ids)), input_ids=input_ids)
        return self._run([op], [Buffer(columns, torch.float32)], inputs, kept)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        scale = pack_norm(weight, weight_offset)
        op = Op(kind=structs.RMS_NORM, x=1, n=x.shape[1], eps=eps, weight=scale.data_ptr())
        buffers = [Buffer(x.shape[1], torch.bfloat16), Buffer(x.shape[1], torch.float32)]
        return self._run([op], buffers, blank_inputs(len(x)), (scale,), x=x)

    def rms_norm_quantized(
        self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> QuantizedRows:
        scale, mode = pack_norm(weight, weight_offset), structs.NORM_BLOCKS
        op = Op(
            kind=structs.RMS_NORM, mode=mode, x=1, n=x.shape[1], eps=eps, weight=scale.data_ptr()
        )
        buffers = [Buffer(x.shape[1], torch.uint8), Buffer(x.shape[1], torch.float32)]
        return _read_blocks(self._run([op], buffers, blank_inputs(len(x)), (scale,), x=x))

    def quantize(self, x: Tensor) -> QuantizedRows:
        op = Op(kind=structs.QUANTIZE, x=1, k=x.shape[1])
        buffers = [Buffer(x.shape[1], torch.uint8), Buffer(x.shape[1], torch.bfloat16)]
        return _read_blocks(self._run([op], buffers, blank_inputs(len(x)), (), x=x))

    def linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: Activation | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        packed_bias = None if bias is None else pack_bias(bias, weight.gated)
        out = Buffer(weight.num_outputs, dtype)
        mode = structs.STORE_F32 if dtype == torch.float32 else structs.STORE_BF16
        if residual is not None:
            mode = structs.ADD_F32
        elif activation is not None:
            mode = structs.SILU if activation == "silu" else structs.GELU
            out = Buffer(weight.num_outputs, torch.bfloat16)
        op = Op(kind=structs.LINEAR, mode=mode, x=1, n=weight.data.shape[0] * structs.PANEL)
        op.k = weight.k
        op.extra = None if packed_bias is None else packed_bias.data_ptr()
        kept = (*_set_weight(op, weight), *(() if packed_bias is None else (packed_bias,)))
        ops, buffers = [op], [out, Buffer(weight.k, torch.bfloat16)]
        if weight.format != "bf16":
            op.x = 2
            buffers.append(Buffer(weight.k, torch.uint8))
            ops.insert(0, Op(kind=structs.QUANTIZE, x=1, out=2, k=weight.k))
        result = self._run(ops, buffers, blank_inputs(len(x)), kept, x=x, out=residual)
        return result if residual is None else residual.copy_(result)

    def rope_kv(
        self,
        qkv: Tensor,
        kv: LayerKV,
        inputs: StepInputs,
        shape: AttentionShape,
        rope: RopeTable | None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        norms = [None if norm is None else pack_norm(norm) for norm in (q_norm, k_norm)]
        op = attention_op(structs.ROPE_KV, shape)
        op.rope, op.eps = -1 if rope is None else 0, eps
        op.rotary_dim = 0 if rope is None else 2 * len(rope.inv_freq)
        op.weight, op.extra = (None if norm is None else norm.data_ptr() for norm in norms)
        columns = shape.num_heads * shape.head_dim
        buffers = [Buffer(columns, torch.bfloat16), Buffer(qkv.shape[1], torch.float32)]
        kept = tuple(norm for norm in norms if norm is not None)
        ropes = () if rope is None else (rope,)
        return self._run([op], buffers, inputs, kept, x=qkv, kv=[kv], ropes=ropes)

    def attend(
        self, queries: Tensor, kv: LayerKV, inputs: StepInputs, shape: AttentionShape
    ) -> Tensor:
        ops = [attention_op(kind, shape) for kind in (structs.ATTEND, structs.MERGE)]
        buffers = [Buffer(queries.shape[1], torch.bfloat16)] * 2
        return self._run(ops, buffers, inputs, (), x=queries, kv=[kv])

    def _run(
        self,
        ops: Sequence[Op],
        buffers: Sequence[Buffer],
        inputs: StepInputs,
        kept: tuple[Tensor, ...],
        x: Tensor | None = None,
        out: Tensor | None = None,
        kv: Sequence[LayerKV] = (),
        ropes: tuple[RopeTable, ...] = (),
    ) -> Tensor:
        """Slot 0 is the output and slot 1 the input."""
        for op in ops:
            op.ldx, op.ldo = buffers[op.x].stride, buffers[op.out].stride
        program = Program(Code(tuple(ops), tuple(buffers), ropes, kept), self._team)
        num_tokens = inputs.input_ids.shape[0]
        program.reserve(num_tokens, 0, 0)
        for slot, values in ((0, out), (1, x)):
            if values is not None:
                program.buffer(slot, num_tokens).copy_(values)
        program.run(inputs, kv)
        return program.buffer(0, num_tokens).clone()


def _set_weight(op: Op, weight: PackedLinear) -> tuple[Tensor, ...]:
    """Point the op to a packed weight; what must be kept alive for it."""
    op.format, op.weight = structs.FORMATS[weight.format], weight.data.data_ptr()
    if weight.scales is None:
        return (weight.data,)
    op.scales = weight.scales.data_ptr()
    return (weight.data, weight.scales)


def _read_blocks(rows: Tensor) -> QuantizedRows:
    """Of bytes [m, groups * BLOCK_BYTES]."""
    num_blocks = rows.shape[1] // structs.BLOCK_BYTES
    blocks = rows.view(len(rows), num_blocks, structs.BLOCK_BYTES)
    codes = blocks[..., : structs.PANEL].contiguous().view(torch.int8).flatten(1)
    scales = blocks[..., structs.PANEL : -4].contiguous().view(torch.float32)[..., 0]
    offsets = blocks[..., -4:].contiguous().view(torch.int32)[..., 0]
    return QuantizedRows(codes, scales, offsets // -128)


def attention_op(kind: int, shape: AttentionShape) -> Op:
    """An op over slot 1's rows; the layer and the strides are the caller's to set."""
    return Op(
        kind=kind,
        x=1,
        rope=-1,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        window=shape.sliding_window or 0,
        scale=shape.scale,
        soft_cap=shape.soft_cap or 0.0,
    )
