"""The CPU kernels' products by shape beside torch's own: GB/s of weights and GFLOP/s.

Weights are copied until they exceed the caches, so few rows measure memory and many arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional

from torchweave_ray.kernels import structs
from torchweave_ray.kernels.arena import Arena
from torchweave_ray.kernels.library import Team
from torchweave_ray.kernels.packing import pack_linear
from torchweave_ray.kernels.program import Buffer, Code, Program, blank_inputs
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
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class KernelPoint:
    model: str
    product: str
    rows: int
    native_us: float
    torch_us: float
    gbyte_s: float
    """Bytes of weights over the native time."""
    gflop_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_products(
    team: Team, models: Sequence[str], rows: Sequence[int], seconds: float
) -> Iterator[KernelPoint]:
    """The best of some runs of `seconds` in all for each point; torch on the same threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(team.num_threads)
    try:
        for model in models:
            for product, n, k in SHAPES[model]:
                for num_rows in rows:
                    yield _measure(team, model, product, n, k, num_rows, seconds)
    finally:
        torch.set_num_threads(threads)


def _measure(
    team: Team, model: str, product: str, n: int, k: int, num_rows: int, seconds: float
) -> KernelPoint:
    copies = -(-_CACHE_BYTES // (n * k * 2))
    weight, x = torch.randn(n, k).bfloat16(), torch.randn(num_rows, k).bfloat16()
    packed, arena = pack_linear(weight).data, Arena()
    placed = tuple(arena.place(packed) for _ in range(copies))
    buffers = (Buffer(n, torch.float32), Buffer(k, torch.bfloat16))
    ops = tuple(_op(w.data_ptr(), w.shape[0] * structs.PANEL, k, buffers) for w in placed)
    program = Program(Code(ops, buffers, kept=placed), team)
    program.reserve(num_rows, 0, 0)
    program.buffer(1, num_rows).copy_(x)
    inputs = blank_inputs(num_rows)
    native = _best(lambda: program.run(inputs, ()), seconds) / copies
    weights = [weight.clone() for _ in range(copies)]
    other = _best(lambda: [functional.linear(x, w) for w in weights], seconds) / copies
    return KernelPoint(
        model,
        product,
        num_rows,
        round(native * 1e6, 1),
        round(other * 1e6, 1),
        round(n * k * 2 / native / 1e9, 1),
        round(2 * num_rows * n * k / native / 1e9, 1),
    )


def _op(weight: int, n: int, k: int, buffers: tuple[Buffer, Buffer]) -> Op:
    out, x = buffers
    return Op(kind=structs.LINEAR, x=1, n=n, k=k, ldx=x.stride, ldo=out.stride, weight=weight)


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
