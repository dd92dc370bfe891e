"""The CPU kernels' products by shape and format, beside torch's own in bf16 and beside what this
machine can do at most: GB/s of weights and GFLOP/s.

Weights are copied until they exceed the caches, so few rows measure memory and many arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchweave_ray.kernels import structs
from torchweave_ray.kernels.arena import Arena
from torchweave_ray.kernels.library import Team
from torchweave_ray.kernels.packing import PackedLinear, pack_linear
from torchweave_ray.kernels.program import Buffer, Code, Program, blank_inputs
from torchweave_ray.kernels.quantization import Format, quantize
from torchweave_ray.kernels.structs import Op

SHAPES: Mapping[str, Sequence[tuple[str, int, int]]] = MappingProxyType(
    {
        "smollm2-135m": (
            ("qkv_proj", 960, 576),
            ("o_proj", 576, 576),
            ("gate_up_proj", 3072, 576),
            ("down_proj", 576, 1536),
            ("head", 49152, 576),
        ),
        "tinyllama-1.1b": (
            ("qkv_proj", 2560, 2048),
            ("o_proj", 2048, 2048),
            ("gate_up_proj", 11264, 2048),
            ("down_proj", 2048, 5632),
            ("head", 32000, 2048),
        ),
    }
)
"""(name, out features, in features) of a model's products."""
FORMATS: tuple[Format, ...] = ("bf16", "int8", "int8-group32", "int4-group32")
_CACHE_BYTES = 64 << 20
_ROUNDS = 1 << 20
"""Some milliseconds of multiplying."""


@dataclass(frozen=True, slots=True)
class KernelPoint:
    model: str
    product: str
    format: Format
    rows: int
    native_us: float
    """Quantising the rows included."""
    torch_us: float
    """Of torch's own bf16 linear, whatever the format."""
    gbyte_s: float
    """Bytes of weights and their scales over the native time."""
    gflop_s: float
    """Two operations a weight and row, of the format's numbers."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the team's threads reach when they do nothing else."""

    read_gbyte_s: float
    bf16_gflop_s: float
    int8_gflop_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(team: Team, seconds: float) -> Ceilings:
    """Reading memory beyond the caches; multiplying what is in registers."""
    memory = Arena().place(torch.ones(4 * _CACHE_BYTES, dtype=torch.uint8))

    def rate(what: int, amount: int) -> float:
        done = team.ceiling(what, memory.data_ptr(), amount)
        best = _best(lambda: team.ceiling(what, memory.data_ptr(), amount), seconds)
        return round(done / best / 1e9, 1)

    return Ceilings(
        rate(structs.READ, len(memory)),
        rate(structs.MULTIPLY_BF16, _ROUNDS),
        rate(structs.MULTIPLY_INT8, _ROUNDS),
    )


def measure_products(
    team: Team,
    models: Sequence[str],
    formats: Sequence[Format],
    rows: Sequence[int],
    seconds: float,
) -> Iterator[KernelPoint]:
    """The best of some runs of `seconds` in all for each point; torch on the same threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(team.num_threads)
    try:
        for model in models:
            for product, n, k in SHAPES[model]:
                weight = torch.randn(n, k).bfloat16()
                inputs = [torch.randn(m, k).bfloat16() for m in rows]
                torch_us = [_torch_us(x, weight, seconds) for x in inputs]
                for format in formats:
                    packed = pack_linear(weight if format == "bf16" else quantize(weight, format))
                    times = _native_us(team, packed, inputs, seconds)
                    for m, us, other in zip(rows, times, torch_us, strict=True):
                        yield _point((model, product), packed, m, us, other)
    finally:
        torch.set_num_threads(threads)


def _point(
    names: tuple[str, str], packed: PackedLinear, rows: int, native_us: float, torch_us: float
) -> KernelPoint:
    return KernelPoint(
        *names,
        packed.format,
        rows,
        round(native_us, 1),
        round(torch_us, 1),
        round(_num_bytes(packed) / native_us / 1e3, 1),
        round(2 * rows * packed.n * packed.k / native_us / 1e3, 1),
    )


def _num_bytes(packed: PackedLinear) -> int:
    return packed.data.nbytes + (0 if packed.scales is None else packed.scales.nbytes)


def _torch_us(x: Tensor, weight: Tensor, seconds: float) -> float:
    weights = [weight.clone() for _ in range(-(-_CACHE_BYTES // weight.nbytes))]
    return _best(lambda: [functional.linear(x, w) for w in weights], seconds) * 1e6 / len(weights)


def _native_us(
    team: Team, packed: PackedLinear, inputs: Sequence[Tensor], seconds: float
) -> list[float]:
    """Of the product with each input."""
    copies = -(-_CACHE_BYTES // _num_bytes(packed))
    program = _program(team, packed, copies)
    times = []
    for x in inputs:
        batch = blank_inputs(len(x))
        program.reserve(len(x), 0, 0)
        program.buffer(1, len(x)).copy_(x)
        run = partial(program.run, batch, ())
        times.append(_best(run, seconds) * 1e6 / copies)
    return times


def _program(team: Team, packed: PackedLinear, copies: int) -> Program:
    """The product with each of some copies of the weight; slot 1 is the input."""
    n, k, arena = packed.n, packed.k, Arena()
    buffers = (Buffer(n, torch.float32), Buffer(k, torch.bfloat16), Buffer(k, torch.uint8))
    ops: list[Op] = []
    kept: list[Tensor] = []
    for _ in range(copies):
        op = Op(kind=structs.LINEAR, x=1, n=packed.data.shape[0] * structs.PANEL, k=k)
        kept.append(arena.place(packed.data))
        op.format, op.weight = structs.FORMATS[packed.format], kept[-1].data_ptr()
        if packed.scales is not None:
            kept.append(arena.place(packed.scales))
            op.scales, op.x = kept[-1].data_ptr(), 2
            ops.append(Op(kind=structs.QUANTIZE, x=1, out=2, k=k))
        ops.append(op)
    for op in ops:
        op.ldx, op.ldo = buffers[op.x].stride, buffers[op.out].stride
    return Program(Code(tuple(ops), buffers, kept=tuple(kept)), team)


def _best(run: Callable[[], object], seconds: float) -> float:
    best = float("inf")
    end = time.perf_counter() + seconds
    for turn in range(1_000):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() > end:
            break
    return best
