"""A mixture of experts as native ops: route, group, spread, two products, mix.

Rows that chose an expert lie together, so that its weights are read once a step.
"""

from __future__ import annotations

import torch

from torchweave_ray.kernels import structs
from torchweave_ray.kernels.packing import PackedLinear
from torchweave_ray.models.emitter import CannotLower, Emitter, address
from torchweave_ray.models.spec import Experts


def lower_experts(to: Emitter, op: Experts) -> None:
    """Raises CannotLower."""
    if op.num_experts > structs.MAX_EXPERTS:
        raise CannotLower(f"more than {structs.MAX_EXPERTS} experts")
    many = {"num_experts": op.num_experts, "top_k": op.top_k}
    gate_up, down = (
        to.pack(name, gated, op.num_experts)
        for name, gated in ((op.gate_up, True), (op.down, False))
    )
    x, total = to.read(op.x, torch.bfloat16), to.read(op.out, torch.float32)
    if gate_up.format != "bf16":
        x = to.quantized(x)
    router = to.read(op.router, torch.float32)
    mode = structs.NORMALIZED if op.normalize else structs.SHARES
    to.emit(structs.ROUTE, router, router, mode=mode, **many)
    to.emit(structs.GROUP_ROWS, router, router, **many)
    source = to.buffers[x]
    spread = to.new(f"spread {source.dtype}", source.columns, source.dtype, op.top_k)
    row_bytes = source.stride * source.dtype.itemsize
    to.emit(structs.SPREAD, x, spread, k=row_bytes, spread=1, **many)
    gated = to.new("gated by experts", gate_up.n // op.num_experts // 2, torch.bfloat16, op.top_k)
    kind = structs.SILU if op.kind == "silu" else structs.GELU
    _product(to, op, gate_up, spread, gated, kind)
    if down.format != "bf16":
        gated = to.quantized(gated)
    parts = to.new("parts of experts", down.n // op.num_experts, torch.float32, op.top_k)
    _product(to, op, down, gated, parts, structs.STORE_F32)
    to.emit(structs.MIX, parts, total, n=to.buffers[total].columns, **many)


def _product(to: Emitter, op: Experts, weight: PackedLinear, x: int, out: int, mode: int) -> None:
    panels = weight.data.shape[0] // op.num_experts
    strides: dict[str, int | None] = {"weight_stride": weight.data.nbytes // op.num_experts}
    if weight.scales is not None:
        strides["scales_stride"] = weight.scales.nbytes // op.num_experts
    to.emit(
        structs.EXPERTS,
        x,
        out,
        mode=mode,
        n=panels * structs.PANEL,
        k=weight.k,
        num_experts=op.num_experts,
        top_k=op.top_k,
        spread=1,
        **address(weight),
        **strides,
    )
