"""The executor of the CPU: a DecoderSpec as one native call a step, in bf16 or quantised with fp32
sums.

A row's result has the same bits alone and in any batch, however its prompt was chunked and
whatever the number of threads; it depends on the instruction set. Owns packed weights and threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Array
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV, StepInputs
from torchweave_ray.kernels.library import Library, Team
from torchweave_ray.kernels.packing import PackedLinear, pack_linear
from torchweave_ray.kernels.program import Program
from torchweave_ray.kernels.structs import Lora
from torchweave_ray.models.lora.fitted import MAX_STACKED, FittedAdapter, adaptable
from torchweave_ray.models.lowering import Lowered, lower
from torchweave_ray.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter's weights for the products that it changes, in the kernels' layout."""

    weights: Array[Lora]
    """By index of the target."""
    kept: tuple[Tensor, ...]
    """The memory that they point to."""
    max_rank: int


@dataclass(frozen=True, slots=True)
class _Compiled:
    lowered: Lowered
    program: Program
    max_rank: int = 0


class NativeExecutor:
    """An `Adaptable`."""

    name = "native"

    def __init__(
        self,
        spec: DecoderSpec,
        tensors: Mapping[str, Tensor | PackedLinear],
        library: Library,
        num_threads: int,
        team: Team | None = None,
    ) -> None:
        """Weights that are packed are used where they lie, others are packed here. `team`: threads
        to use in place of new ones. Raises CannotLower when the kernels lack something that the
        spec needs."""
        self._spec = spec
        self._targets = tuple(adaptable(spec))
        lowered = lower(spec, tensors)
        self.isa = library.isa
        self.team = team or library.create_team(num_threads)
        """Sleeps between calls; others may run on it between steps."""
        self._plain = _Compiled(lowered, Program(lowered.code, self.team))
        self._adapted: _Compiled | None = None
        """Of steps with adapters; made for the first of them."""

    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`: [R, vocab_size] float32. The memory is the executor's:
        edit it freely, but the next call writes over it."""
        of = self._run(inputs, kv)
        logits = of.program.buffer(of.lowered.logits, inputs.logit_rows.shape[0])
        cap = self._spec.logits_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """What the head's product reads for `inputs.logit_rows`: [R, hidden_size] float32, before
        it is quantised."""
        of = self._run(inputs, kv, to_hidden=True)
        return of.program.buffer(of.lowered.head_input, inputs.logit_rows.shape[0]).float()

    def load_adapter(self, adapter: FittedAdapter) -> PackedAdapter:
        """Its weights in bfloat16, packed. Any thread may call."""
        kept: list[Tensor] = []
        weights = (Lora * len(self._targets))()
        for entry, name in zip(weights, self._targets, strict=True):
            if (pair := adapter.pairs.get(name)) is None:
                continue
            is_gated = adaptable(self._spec)[name]
            shrink, expand = pack_linear(pair.a), pack_linear(pair.b, is_gated)
            entry.rank = pair.a.shape[0]
            entry.shrink, entry.expand = shrink.data.data_ptr(), expand.data.data_ptr()
            kept += [shrink.data, expand.data]
        return PackedAdapter(weights, tuple(kept), MAX_STACKED * adapter.rank)

    def _run(self, inputs: StepInputs, kv: Sequence[LayerKV], to_hidden: bool = False) -> _Compiled:
        adapters = [rows.adapter for rows in inputs.adapters]
        packed = [adapter for adapter in adapters if isinstance(adapter, PackedAdapter)]
        assert len(packed) == len(adapters), "an adapter is loaded by the executor that runs it"
        of = self._compiled(max((each.max_rank for each in packed), default=0))
        num_ops = of.lowered.num_hidden_ops if to_hidden else None
        of.program.run(inputs, kv, num_ops, [each.weights for each in packed])
        return of

    def _compiled(self, max_rank: int) -> _Compiled:
        if max_rank == 0:
            return self._plain
        if self._adapted is None or self._adapted.max_rank < max_rank:
            lowered = lower(self._spec, self._plain.lowered.tensors, self._targets, max_rank)
            self._adapted = _Compiled(lowered, Program(lowered.code, self.team), max_rank)
        return self._adapted
