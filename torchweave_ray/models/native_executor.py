"""The executor of the CPU: a DecoderSpec as one native call a step, in bf16 or quantised with fp32
sums.

A row's result has the same bits alone and in any batch, however its prompt was chunked and
whatever the number of threads; it depends on the instruction set. Owns packed weights and threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV, StepInputs
from torchweave_ray.kernels.library import Library
from torchweave_ray.kernels.packing import PackedLinear
from torchweave_ray.kernels.program import Program
from torchweave_ray.models.lowering import lower
from torchweave_ray.models.spec import DecoderSpec


class NativeExecutor:
    """An `Executor`."""

    name = "native"

    def __init__(
        self,
        spec: DecoderSpec,
        tensors: Mapping[str, Tensor | PackedLinear],
        library: Library,
        num_threads: int,
    ) -> None:
        """Weights that are packed are used where they lie, others are packed here. Raises
        CannotLower when the kernels lack something that the spec needs."""
        self._spec = spec
        self._lowered = lower(spec, tensors)
        self.isa = library.isa
        self.team = library.create_team(num_threads)
        """Sleeps between calls; others may run on it between steps."""
        self._program = Program(self._lowered.code, self.team)

    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`: [R, vocab_size] float32. The memory is the executor's:
        edit it freely, but the next call writes over it."""
        self._program.run(inputs, kv)
        logits = self._program.buffer(self._lowered.logits, inputs.logit_rows.shape[0])
        cap = self._spec.logits_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """What the head's product reads for `inputs.logit_rows`: [R, hidden_size] float32, before
        it is quantised."""
        self._program.run(inputs, kv, self._lowered.num_hidden_ops)
        return self._program.buffer(self._lowered.head_input, inputs.logit_rows.shape[0]).float()
