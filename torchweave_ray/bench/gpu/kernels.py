"""Each kernel at TinyLlama's shape: time, the torch twin's time, and its share of a ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from torchweave_ray.attention.base import AttentionShape, HeadNorms, LayerKV, StepInputs
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.attention.triton_paged import TritonPagedAttention
from torchweave_ray.attention.varlen import PAGE, VarlenAttention, why_no_varlen
from torchweave_ray.bench.gpu.device import Ceilings, time_us
from torchweave_ray.kernels.quantization import QuantizedFormat, QuantizedLinear, quantize
from torchweave_ray.kernels.triton.ops import TritonOps
from torchweave_ray.models.ops import TorchOps
from torchweave_ray.runner.sampler import Draw, sample
from torchweave_ray.runner.sampling.triton import TritonSampler
from torchweave_ray.sampling_params import SamplingParams

_BF16 = torch.bfloat16
_BLOCK = 16
_ROUNDING = 0.05
"""Of attention's results, which are at most about 1."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    intermediate: int
    vocab: int
    shape: AttentionShape
    decodes: tuple[tuple[int, int], ...]
    """(sequences, positions of each)"""
    prompt: int
    rows: tuple[int, ...]


_FULL = _Sizes(
    2048, 5632, 32000, AttentionShape(32, 4, 64, 0.125),
    ((1, 512), (1, 4096), (8, 512), (64, 512), (256, 512)), 2048, (1, 8, 64, 256),
)  # fmt: skip
_DRY = _Sizes(64, 128, 320, AttentionShape(4, 2, 16, 0.25), ((1, 40), (3, 300)), 20, (1, 3))


def measure_kernels(device: torch.device, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    sizes = _DRY if device.type == "cpu" else _FULL
    table = _Table(device, ceilings)
    yield from _attention(sizes, table)
    for rows in sizes.rows:
        yield from _elementwise(sizes, rows, table)
        yield from _products(sizes, rows, table)
        yield from _sampling(sizes, rows, table)


@dataclass(frozen=True, slots=True)
class _Table:
    device: torch.device
    ceilings: Ceilings

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(_BF16)

    def line(
        self,
        name: str,
        ours: Callable[[], object],
        theirs: Callable[[], object] | None,
        num_bytes: float = 0,
        flops: float = 0,
    ) -> dict[str, Any]:
        """`theirs`: the torch twin, or the vendor's product for bf16 weights."""
        us = time_us(ours, self.device)
        line: dict[str, Any] = {"kernel": name, "us": round(us, 2)}
        if theirs is not None:
            line["torch_us"] = round(time_us(theirs, self.device), 2)
        if num_bytes:
            line["gbyte_s"] = round(num_bytes / us / 1e3, 1)
            line["share_of_bandwidth"] = round(line["gbyte_s"] / self.ceilings.gbyte_s, 3)
        if flops:
            line["tflop_s"] = round(flops / us / 1e6, 2)
            line["share_of_product"] = round(line["tflop_s"] / self.ceilings.tflop_s, 3)
        return line


def _attention(sizes: _Sizes, table: _Table) -> Iterator[dict[str, Any]]:
    shape = sizes.shape
    ours, theirs = TritonPagedAttention(), TorchPagedAttention()
    row_bytes = 2 * shape.num_kv_heads * shape.head_dim * _BF16.itemsize
    for num_seqs, length in sizes.decodes:
        inputs, kv = _step(num_seqs, 1, length, shape, table.device)
        queries = table.randn(num_seqs, shape.num_heads, shape.head_dim)
        yield table.line(
            f"attention, {num_seqs} decodes over {length}",
            partial(ours.forward, queries, kv, inputs, shape),
            partial(theirs.forward, queries, kv, inputs, shape),
            num_seqs * length * row_bytes,
        )
    yield from _varlen(sizes, table)
    inputs, kv = _step(1, sizes.prompt, sizes.prompt, shape, table.device)
    queries = table.randn(sizes.prompt, shape.num_heads, shape.head_dim)
    yield table.line(
        f"attention, a prompt of {sizes.prompt}",
        partial(ours.forward, queries, kv, inputs, shape),
        partial(theirs.forward, queries, kv, inputs, shape),
        flops=2 * shape.num_heads * shape.head_dim * sizes.prompt**2,
    )


def _varlen(sizes: _Sizes, table: _Table) -> Iterator[dict[str, Any]]:
    """torch's own beside ours, over blocks that it takes; `same`: within bf16's rounding."""
    why = "the device is a CPU" if table.device.type == "cpu" else why_no_varlen(PAGE)
    if why is not None:
        yield {"kernel": "varlen_attn", "skipped": why}
        return
    shape, ours = sizes.shape, TritonPagedAttention()
    theirs = VarlenAttention(ours)
    for num_seqs, length in sizes.decodes:
        inputs, kv = _step(num_seqs, 1, length, shape, table.device, PAGE)
        arguments = (table.randn(num_seqs, shape.num_heads, shape.head_dim), kv, inputs, shape)
        difference = (ours.forward(*arguments) - theirs.forward(*arguments)).abs().max().item()
        name = f"attention in blocks of {PAGE}, {num_seqs} decodes over {length}"
        line = table.line(name, partial(ours.forward, *arguments), None)
        varlen_us = round(time_us(partial(theirs.forward, *arguments), table.device), 2)
        yield {**line, "varlen_us": varlen_us, "is_right": difference < _ROUNDING}


def _elementwise(sizes: _Sizes, rows: int, table: _Table) -> Iterator[dict[str, Any]]:
    ours, theirs = TritonOps(), TorchOps(TorchPagedAttention())
    hidden, x, weight = table.randn(rows, sizes.hidden), table.randn(rows, sizes.hidden), None
    weight = table.randn(sizes.hidden)
    yield table.line(
        f"add and RMSNorm, {rows} rows",
        partial(ours.add_rms_norm, hidden, x, weight, 1e-5, 0.0),
        partial(theirs.add_rms_norm, hidden, x, weight, 1e-5, 0.0),
        4 * rows * sizes.hidden * _BF16.itemsize,
    )
    both = table.randn(rows, 2 * sizes.intermediate)
    yield table.line(
        f"gated activation, {rows} rows",
        partial(ours.gated, both, "silu"),
        partial(theirs.gated, both, "silu"),
        3 * rows * sizes.intermediate * _BF16.itemsize,
    )
    shape = sizes.shape
    inputs, kv = _step(rows, 1, 64, shape, table.device)
    num_all = shape.num_heads + 2 * shape.num_kv_heads
    qkv = table.randn(rows, num_all, shape.head_dim)
    cos = torch.ones(rows, 1, shape.head_dim, device=table.device)
    arguments = (qkv, shape, (cos, cos), HeadNorms(), kv, inputs)
    yield table.line(
        f"rotation and KV write, {rows} rows",
        partial(ours.rotate_and_write, *arguments),
        partial(theirs.rotate_and_write, *arguments),
        2 * rows * num_all * shape.head_dim * _BF16.itemsize,
    )


def _products(sizes: _Sizes, rows: int, table: _Table) -> Iterator[dict[str, Any]]:
    n, k = 2 * sizes.intermediate, sizes.hidden
    x, weight = table.randn(rows, k), table.randn(n, k)
    vendor = partial(torch.nn.functional.linear, x, weight)
    flops = 2 * rows * n * k
    yield table.line(f"vendor's product, {rows} rows", vendor, None, weight.nbytes, flops)
    yield table.line(
        f"invariant product, {rows} rows",
        partial(TritonOps(batch_invariant=True).linear, x, weight, None),
        vendor,
        weight.nbytes,
        flops,
    )
    for format in get_args(QuantizedFormat):
        coded = quantize(weight.cpu(), format)
        parts = [part for part in (coded.codes, coded.scales, coded.mins) if part is not None]
        moved = QuantizedLinear(format, *(part.to(table.device) for part in parts))
        ours = partial(TritonOps().linear, x, moved, None)
        num_bytes = sum(part.nbytes for part in parts)
        yield table.line(f"{format} product, {rows} rows", ours, vendor, num_bytes, flops)


def _sampling(sizes: _Sizes, rows: int, table: _Table) -> Iterator[dict[str, Any]]:
    logits = 4 * torch.randn(rows, sizes.vocab, device=table.device)
    for name, params in (
        ("greedy", SamplingParams(temperature=0.0)),
        ("plain", SamplingParams()),
        ("top-k 50, top-p 0.9, min-p 0.05", SamplingParams(top_k=50, top_p=0.9, min_p=0.05)),
    ):
        draws = [Draw(params, i, 0) for i in range(rows)]
        ours, theirs = TritonSampler(), sample
        same = ours(logits, draws).tolist() == theirs(logits, draws)
        line = table.line(
            f"sampling, {name}, {rows} rows",
            partial(ours, logits, draws),
            partial(theirs, logits, draws),
        )
        yield {**line, "same_tokens": same}


def _step(
    num_seqs: int,
    new: int,
    length: int,
    shape: AttentionShape,
    device: torch.device,
    block_size: int = _BLOCK,
) -> tuple[StepInputs, LayerKV]:
    """`new` tokens of each sequence at the end of `length` positions, blocks in disorder."""
    width = -(-length // block_size)
    blocks = torch.randperm(num_seqs * width, device=device)
    tables = blocks.view(num_seqs, width)
    positions = torch.arange(length - new, length, device=device).repeat(num_seqs)
    owners = torch.arange(num_seqs, device=device).repeat_interleave(new)
    dims = (len(blocks), shape.num_kv_heads, block_size, shape.head_dim)
    parts = [torch.randn(dims, device=device).to(_BF16) for _ in range(2)]
    inputs = StepInputs(
        input_ids=positions,
        positions=positions,
        slot_mapping=tables[owners, positions // block_size] * block_size + positions % block_size,
        query_start_loc=torch.arange(0, num_seqs * new + 1, new, dtype=torch.int32, device=device),
        seq_lens=torch.full((num_seqs,), length, dtype=torch.int32, device=device),
        block_tables=tables.int(),
        logit_rows=positions[:0],
        max_query_len=new,
        max_seq_len=length,
    )
    return inputs, LayerKV(*parts)
