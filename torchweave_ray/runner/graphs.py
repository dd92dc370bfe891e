"""Decodes replayed as graphs of a device: which sizes there are, and the executor that has them.

A graph does the same work over the same memory every time, so a step of decodes is padded to a size
of the ladder. What a graph is, is the device's. Knows no sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV, StepInputs
from torchweave_ray.engine.plan import StepOutput
from torchweave_ray.models.spec import Executor
from torchweave_ray.runner.inputs import Chunk, Padding

logger = logging.getLogger(__name__)

_DENSE = (1, 2, 4)
_STRIDE = 8
_WIDE = 256
_FEWEST_POSITIONS = 256
"""Of the smallest context; each further one is twice as long."""


class Graph(Protocol):
    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Record what `run` does; its result's memory, which every replay fills anew."""
        ...

    def replay(self) -> None: ...


class Ladder:
    """Numbers of sequences: 1, 2, 4, multiples of 8 to 256, then of 32; contexts: powers of 2."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        sizes = [n for n in _DENSE if n < max_num_seqs]
        sizes += range(_STRIDE, min(max_num_seqs, _WIDE), _STRIDE)
        sizes += range(_WIDE, max_num_seqs, 4 * _STRIDE)
        self.sizes = (*sizes, max_num_seqs)
        self._longest = max_model_len

    def fit(self, chunks: Sequence[Chunk], block_size: int) -> Padding | None:
        """None: not only decodes without drafts and adapters that all draw, or too many."""
        if len(chunks) > self.sizes[-1] or not all(_is_decode(chunk) for chunk in chunks):
            return None
        longest = max(chunk.sequence.start for chunk in chunks) + 1
        positions = _FEWEST_POSITIONS
        while positions < longest:
            positions *= 2
        num_seqs = next(size for size in self.sizes if size >= len(chunks))
        return Padding(num_seqs, -(-min(positions, max(self._longest, longest)) // block_size))


def _is_decode(chunk: Chunk) -> bool:
    seq = chunk.sequence
    return chunk.num_positions == 1 and seq.output is StepOutput.SAMPLE and not seq.adapter_id


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Graph
    inputs: StepInputs
    """Over memory of its own, which is filled before each replay."""
    logits: Tensor


@dataclass(frozen=True, slots=True)
class DecodeGraphs:
    """What a runner needs to have its steps of decodes replayed."""

    ladder: Ladder
    make_graph: Callable[[], Graph]

    def wrap(self, executor: Executor) -> GraphExecutor:
        return GraphExecutor(executor, self.make_graph, self.ladder.sizes[-1])


class GraphExecutor:
    """An `Executor` around another: padded batches are replayed, others go through. A size is
    captured when it is first needed, and again when the cache is another."""

    def __init__(
        self, executor: Executor, make_graph: Callable[[], Graph], max_num_seqs: int
    ) -> None:
        self._executor = executor
        self._max_num_seqs = max_num_seqs
        self._make_graph = make_graph
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._kv: Sequence[LayerKV] | None = None
        self._logits: Tensor | None = None
        """Of all graphs: only one of them runs at a time."""

    @property
    def name(self) -> str:
        return self._executor.name

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`, padding left out: [R, vocab_size] float32. Those of a
        graph hold until its next replay."""
        if inputs.packed is None:
            return self._executor.forward(inputs, kv)
        if kv is not self._kv:
            self._captured.clear()
            self._kv = kv
        key = (inputs.seq_lens.shape[0], inputs.block_tables.shape[1])
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(inputs, kv)
        assert captured.inputs.packed is not None
        for mine, new in zip(captured.inputs.packed, inputs.packed, strict=True):
            mine.copy_(new)
        captured.graph.replay()
        return captured.logits[: key[0] - inputs.num_padding]

    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        assert inputs.packed is None
        return self._executor.hidden(inputs, kv)

    def _capture(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> _Captured:
        assert inputs.packed is not None
        own = _over(inputs, inputs.packed[0].clone(), inputs.packed[1].clone())
        graph = self._make_graph()
        logits = self._executor.forward(own, kv)  # compiles what is compiled, before it counts
        if self._logits is None:
            self._logits = logits.new_empty(self._max_num_seqs, logits.shape[1])
        out = self._logits[: logits.shape[0]]
        logits = graph.capture(lambda: out.copy_(self._executor.forward(own, kv)))
        logger.info(
            "[Graph] captured decodes of %d sequences, up to %d positions",
            own.seq_lens.shape[0],
            own.max_seq_len,
        )
        return _Captured(graph, own, logits)


def _over(inputs: StepInputs, wide: Tensor, narrow: Tensor) -> StepInputs:
    """The same batch in other memory."""
    num = inputs.seq_lens.shape[0]
    sizes = [num, num, inputs.slot_mapping.shape[0], num]
    ids, positions, slots, rows = torch.split(wide, sizes)
    starts, seq_lens, tables = torch.split(narrow, [num + 1, num, inputs.block_tables.numel()])
    return replace(
        inputs,
        input_ids=ids,
        positions=positions,
        slot_mapping=slots,
        logit_rows=rows,
        query_start_loc=starts,
        seq_lens=seq_lens,
        block_tables=tables.view(inputs.block_tables.shape),
        packed=(wide, narrow),
        num_padding=0,
    )
