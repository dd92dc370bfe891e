"""Drives an executor over a paged cache as a runner would, with block tables shuffled on purpose.

Reused slots start as NaN: whatever reads beyond a sequence's end shows in the logits. No test here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchweave_ray.attention.base import (
    AdapterRows,
    AttentionBackend,
    HeadNorms,
    LayerKV,
    StepInputs,
)
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.ops import Ops
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import DecoderSpec
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights

CPU = torch.device("cpu")


@dataclass(slots=True)
class Text:
    token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0


def make_inputs(
    chunks: Sequence[tuple[Text, int]], block_size: int, all_rows: bool = True
) -> StepInputs:
    """The next n tokens of each sequence. Its block table must reach far enough."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for sequence, n in chunks:
        for position in range(sequence.num_computed, sequence.num_computed + n):
            ids.append(sequence.token_ids[position])
            positions.append(position)
            block = sequence.block_table[position // block_size]
            slots.append(block * block_size + position % block_size)
        starts.append(len(ids))
    lens = [sequence.num_computed + n for sequence, n in chunks]
    width = max(len(sequence.block_table) for sequence, _ in chunks)
    tables = [s.block_table + [0] * (width - len(s.block_table)) for s, _ in chunks]
    rows = range(len(ids)) if all_rows else [start - 1 for start in starts[1:]]
    return StepInputs(
        input_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        logit_rows=torch.tensor(list(rows)),
        max_query_len=max(n for _, n in chunks),
        max_seq_len=max(lens),
    )


T = TypeVar("T", HeadNorms, LayerKV, StepInputs)


def on_device(held: T, device: torch.device) -> T:
    """The same with its tensors on the device."""
    values = {f.name: getattr(held, f.name) for f in fields(held)}
    tensors: Any = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(held, **tensors)


def assert_close(got: Tensor, expected: Tensor) -> None:
    worst = ((got - expected).abs().max() / expected.abs().max()).item()
    assert worst <= 1e-4, worst
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def random_texts(*lengths: int, vocab: int = 300) -> list[list[int]]:
    draw = random.Random(sum(lengths))
    return [[draw.randrange(3, vocab) for _ in range(n)] for n in lengths]


class PagedDecoder:
    """An artifact on the torch executor with a cache of its own."""

    def __init__(
        self,
        artifact: Path,
        num_blocks: int = 64,
        block_size: int = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: torch.device = CPU,
        attention: AttentionBackend | None = None,
        ops: Ops | None = None,
    ) -> None:
        """`attention`, `ops`: None: the reference's."""
        config = ModelConfig.read(artifact)
        self.spec: DecoderSpec = build_spec(config)
        self.block_size = block_size
        self._device = device
        weights = load_weights(artifact, config, dtype, device)
        attention = attention or TorchPagedAttention()
        self.executor = TorchExecutor(self.spec, weights, attention, ops)
        shape = (num_blocks, self.spec.num_kv_heads, block_size, self.spec.head_dim)
        self.kv = [
            LayerKV(
                *(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)),
            )
            for _ in range(self.spec.num_layers)
        ]
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def step(
        self, chunks: Sequence[tuple[Text, int]], adapters: Sequence[object] = ()
    ) -> list[Tensor]:
        """Logits [n, vocab] of each sequence's next n tokens. `adapters`: of the last chunks."""
        for sequence, n in chunks:
            needed = -(-(sequence.num_computed + n) // self.block_size)
            while len(sequence.block_table) < needed:
                sequence.block_table.append(self._free.pop())
        inputs = on_device(make_inputs(chunks, self.block_size), self._device)
        if adapters:
            num_plain = len(chunks) - len(adapters)
            bounds = inputs.query_start_loc.tolist()[num_plain:]
            rows = [
                AdapterRows(a, *ends) for a, ends in zip(adapters, pairwise(bounds), strict=True)
            ]
            inputs = replace(inputs, adapters=tuple(rows))
        logits = self.executor.forward(inputs, self.kv)
        for sequence, n in chunks:
            sequence.num_computed += n
        return list(torch.split(logits, [n for _, n in chunks]))
