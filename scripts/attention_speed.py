"""Attention of the CPU kernels over a bfloat16 and an int8 cache: time a layer, GB/s, GFLOP/s.

Backs the figures of docs/performance.md. The layers' caches together exceed the processor's own, so
decoding reads memory. Run it with `--save` to write a results file.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from torchweave_ray.attention.base import AttentionShape, LayerKV, StepInputs
from torchweave_ray.bench.origin import save_results
from torchweave_ray.kernels import structs
from torchweave_ray.kernels.library import Team, load_library
from torchweave_ray.kernels.machine import num_cores
from torchweave_ray.kernels.ops import attention_op
from torchweave_ray.kernels.program import Buffer, Code, Program, blank_inputs

SHAPE = AttentionShape(num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125)  # SmolLM2-135M
BLOCK_SIZE, CACHE_BYTES, SECONDS = 16, 100 << 20, 0.4
# (sequences, new tokens of each, positions of each)
BATCHES = [(1, 1, 256), (1, 1, 2000), (1, 1, 4000), (1, 1, 8000)]
BATCHES += [(16, 1, 256), (16, 1, 2000), (16, 1, 8000), (1, 512, 2000), (1, 512, 4000)]


def batch(num_seqs: int, query_len: int, seq_len: int) -> StepInputs:
    """Blocks lie scattered, as in a server that has run for a while."""
    width = -(-seq_len // BLOCK_SIZE)
    blocks = list(range(num_seqs * width))
    random.Random(0).shuffle(blocks)
    return replace(
        blank_inputs(num_seqs * query_len),
        query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32) * query_len,
        seq_lens=torch.full((num_seqs,), seq_len, dtype=torch.int32),
        block_tables=torch.tensor(blocks, dtype=torch.int32).view(num_seqs, width),
        max_query_len=query_len,
    )


def layer(num_blocks: int, dtype: torch.dtype) -> LayerKV:
    dims = (num_blocks, SHAPE.num_kv_heads, BLOCK_SIZE, SHAPE.head_dim)
    if dtype == torch.bfloat16:
        return LayerKV(torch.randn(dims).to(dtype), torch.randn(dims).to(dtype))
    codes = [torch.randint(-127, 128, dims, dtype=torch.int8) for _ in range(2)]
    scales = [torch.rand(dims[:3]) / 50 for _ in range(2)]
    return LayerKV(codes[0], codes[1], scales[0], scales[1])


def measure(
    team: Team, num_seqs: int, query_len: int, seq_len: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The best of the runs of `SECONDS`; each walks all layers once."""
    inputs = batch(num_seqs, query_len, seq_len)
    first = layer(inputs.block_tables.numel(), dtype)
    tensors = (first.keys, first.values, first.key_scales, first.value_scales)
    num_bytes = sum(t.nbytes for t in tensors if t is not None)
    kv = [
        first,
        *(layer(inputs.block_tables.numel(), dtype) for _ in range(CACHE_BYTES // num_bytes)),
    ]
    buffers = (Buffer(SHAPE.num_heads * SHAPE.head_dim, torch.bfloat16),) * 2
    ops = []
    for index in range(len(kv)):
        for kind in (structs.ATTEND, structs.MERGE):
            op = attention_op(kind, SHAPE)
            op.layer, op.ldx, op.ldo = index, buffers[1].stride, buffers[0].stride
            ops.append(op)
    program = Program(Code(tuple(ops), buffers), team)
    program.reserve(num_seqs * query_len, 0, 0)
    program.buffer(1, num_seqs * query_len).normal_()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        program.run(inputs, kv)
        best = min(best, (time.perf_counter() - start) / len(kv))
    seen = num_seqs * query_len * (seq_len - (query_len - 1) / 2)
    return {
        "num_seqs": num_seqs,
        "query_len": query_len,
        "seq_len": seq_len,
        "kv_dtype": str(dtype).removeprefix("torch."),
        "us": round(best * 1e6, 1),
        "gbyte_s": round(num_bytes / best / 1e9, 1),
        "gflop_s": round(4 * SHAPE.num_heads * SHAPE.head_dim * seen / best / 1e9, 1),
    }


def main() -> None:
    library = load_library()
    team = library.create_team(num_cores())
    points = []
    for sizes in BATCHES:
        for dtype in (torch.bfloat16, torch.int8):
            points.append(measure(team, *sizes, dtype))
            print(points[-1], flush=True)
    if "--save" in sys.argv:
        config = {"isa": library.isa, "threads": team.num_threads, "block_size": BLOCK_SIZE}
        print(save_results("attention", config, points))


if __name__ == "__main__":
    main()
