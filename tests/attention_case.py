"""A step of attention over random contents, and the textbook formula for it, one sequence and one
head at a time. No test in here."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from tests.parity.paged import Text, make_inputs, on_device
from torchweave_ray.attention.base import (
    AttentionBackend,
    AttentionShape,
    LayerKV,
    StepInputs,
)

BLOCK_SIZE = 4
NUM_BLOCKS = 40
MIXED = [(0, 1), (9, 1), (3, 6), (17, 1), (0, 11), (5, 3), (30, 3)]
"""(already computed, new) of each sequence: decodes, drafts, prompt chunks, out of order."""


def among_groups(inputs: StepInputs, kv: LayerKV) -> tuple[StepInputs, LayerKV]:
    """The same as the second of three KV groups; the others have block 0 only."""

    def among(rows: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(rows), rows, torch.zeros_like(rows)))

    inputs = replace(
        inputs,
        slot_mapping=among(inputs.slot_mapping),
        block_tables=among(inputs.block_tables),
    )
    return inputs, replace(kv, group=1)


class Case:
    """A step over random contents; what is in no sequence's slots is NaN."""

    def __init__(self, shape: AttentionShape, spans: list[tuple[int, int]], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_blocks = NUM_BLOCKS + sum(start + n for start, n in spans) // BLOCK_SIZE
        free = list(range(num_blocks))
        random.Random(seed).shuffle(free)
        self.shape = shape
        cache = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.kv = LayerKV(torch.full(cache, torch.nan), torch.full(cache, torch.nan))
        self.keys, self.values, chunks = [], [], []
        for start, n in spans:
            length = start + n
            size = (length, shape.num_kv_heads, shape.head_dim)
            self.keys.append(torch.randn(size, generator=generator))
            self.values.append(torch.randn(size, generator=generator))
            table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
            for position in range(start):
                block, slot = table[position // BLOCK_SIZE], position % BLOCK_SIZE
                self.kv.keys[block, :, slot] = self.keys[-1][position]
                self.kv.values[block, :, slot] = self.values[-1][position]
            chunks.append((Text([0] * length, table, start), n))
        self.spans = spans
        self.inputs: StepInputs = make_inputs(chunks, BLOCK_SIZE)
        num_tokens = sum(n for _, n in spans)
        self.queries = torch.randn(num_tokens, shape.num_heads, shape.head_dim, generator=generator)

    def to(self, device: torch.device) -> Case:
        """Cache, inputs and queries move; what `expected` reads stays."""
        self.kv, self.inputs = on_device(self.kv, device), on_device(self.inputs, device)
        return self

    def run(self, backend: AttentionBackend) -> Tensor:
        """On the cache's device, in the queries' dtype; the result is on the CPU."""
        device = self.kv.keys.device
        new = [torch.cat([t[s:] for t, (s, _) in zip(a, self.spans, strict=True)])
               for a in (self.keys, self.values)]  # fmt: skip
        new = [each.to(device, self.queries.dtype) for each in new]
        backend.write_kv(new[0], new[1], self.kv, self.inputs)
        queries = self.queries.to(device)
        return backend.forward(queries, self.kv, self.inputs, self.shape).cpu()

    def expected(self) -> Tensor:
        out, row = [], 0
        for keys, values, (start, n) in zip(self.keys, self.values, self.spans, strict=True):
            for position in range(start, start + n):
                out.append(attend_one(self.queries[row], keys, values, position, self.shape))
                row += 1
        return torch.stack(out)


def attend_one(
    query: Tensor, keys: Tensor, values: Tensor, position: int, shape: AttentionShape
) -> Tensor:
    window = shape.sliding_window or position + 1
    seen = slice(max(0, position + 1 - window), position + 1)
    heads = []
    for head in range(shape.num_heads):
        kv_head = head // (shape.num_heads // shape.num_kv_heads)
        scores = keys[seen, kv_head] @ query[head] * shape.scale
        if shape.soft_cap is not None:
            scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
        heads.append(scores.softmax(0) @ values[seen, kv_head])
    return torch.stack(heads)
