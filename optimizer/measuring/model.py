"""A staged model made ready to be measured: its executor, a KV cache, and batches by their shape.

Knows no scheduler: a batch is a list of (start, num_tokens), one pair a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV, StepInputs
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.hf.opening import open_executor
from torchweave_ray.kernels.machine import num_cores
from torchweave_ray.models.artifact import Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement, executor_name
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import DecoderSpec, Executor

BLOCK = 16


@dataclass(frozen=True)
class MeasuredModel:
    executor: Executor
    executor_name: str
    spec: DecoderSpec
    dtype: torch.dtype
    kv_dtype: torch.dtype | None = None
    """None: `dtype`."""

    def cache(self, num_tokens: int, num_seqs: int = 1) -> list[LayerKV]:
        """Room for so many tokens a sequence."""
        dtype = self.kv_dtype or self.dtype
        layers = range(self.spec.num_layers)
        return [layer_cache(self.spec, num_tokens, num_seqs, dtype) for _ in layers]


def layer_cache(spec: DecoderSpec, num_tokens: int, num_seqs: int, dtype: torch.dtype) -> LayerKV:
    """Of one layer: room for so many tokens a sequence."""
    shape = (num_seqs * num_blocks(num_tokens), spec.num_kv_heads, BLOCK, spec.head_dim)
    parts: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, dtype)] * 2
    if dtype == torch.int8:
        parts += [(shape[:-1], torch.float32)] * 2
    return LayerKV(*(torch.zeros(dims, dtype=kind) for dims, kind in parts))


def open_staged(
    folder: Path, manifest: Manifest, threads: int, executor: Literal["auto", "torch"] = "auto"
) -> MeasuredModel:
    """As a replica on this machine's CPU would serve it; torch: as it would without kernels."""
    config = ModelConfig.read(folder)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[manifest.dtype]
    placement = Placement(dtype, torch.device("cpu"), threads, executor)
    opened = open_executor(folder, config, manifest, placement, TorchPagedAttention())
    kv_dtype = torch.int8 if manifest.kv_dtype == "int8" else None
    return MeasuredModel(opened, executor_name(opened), build_spec(config), dtype, kv_dtype)


@contextmanager
def torch_threads(threads: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def all_cores() -> AbstractContextManager[int]:
    """Lets torch use every core of this process (Ray gives a worker one); gives their number."""
    return torch_threads(num_cores())


def make_inputs(
    chunks: Sequence[tuple[int, int]], token_ids: Tensor, num_tokens: int, every_row: bool = False
) -> StepInputs:
    """One step: sequence s computes positions [start, start + n) of `chunks[s]`.

    `token_ids` [T] of all of them; `num_tokens` as the cache was made with. `every_row`: logits of
    all tokens, else of each sequence's last one.
    """
    width = num_blocks(num_tokens)
    tables = torch.arange(len(chunks) * width, dtype=torch.int32).view(len(chunks), width)
    positions = torch.cat([torch.arange(start, start + n) for start, n in chunks])
    lengths = torch.tensor([n for _, n in chunks])
    first_slots = (torch.arange(len(chunks)) * width * BLOCK).repeat_interleave(lengths)
    ends = list(accumulate(n for _, n in chunks))
    rows = range(ends[-1]) if every_row else [end - 1 for end in ends]
    return StepInputs(
        input_ids=token_ids,
        positions=positions,
        slot_mapping=first_slots + positions,
        query_start_loc=torch.tensor([0, *ends], dtype=torch.int32),
        seq_lens=torch.tensor([start + n for start, n in chunks], dtype=torch.int32),
        block_tables=tables,
        logit_rows=torch.tensor(list(rows)),
        max_query_len=max(n for _, n in chunks),
        max_seq_len=max(start + n for start, n in chunks),
    )


def num_blocks(num_tokens: int) -> int:
    """Of a cache that holds so many tokens of a sequence."""
    return -(-num_tokens // BLOCK)
