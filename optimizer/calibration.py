"""What the products of a model read over the calibration text, one product after another.

Each one sees what those before it give with the weights that took their place, as it will when the
model is served: so it makes up for their errors too. Knows no rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from optimizer.checkpoints import Checkpoint
from optimizer.gptq import Moments
from optimizer.measuring.layerwise import LayerwiseModel, SourceTensors
from torchweave_ray.kernels.quantization import QuantizedLinear, dequantize
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.spec import Linear, Op


class _ReplacedTensors(SourceTensors):
    """The source's, but for those in `replaced`; these are needed until their op has run."""

    replaced: dict[str, QuantizedLinear]

    def __getitem__(self, name: str) -> Tensor:
        weight = self.replaced.get(name)
        return super().__getitem__(name) if weight is None else dequantize(weight)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        weight = self.replaced.get(name)
        if weight is None:
            return super().rows(name, ids)
        mins = None if weight.mins is None else weight.mins[ids]
        return dequantize(
            QuantizedLinear(weight.format, weight.codes[ids], weight.scales[ids], mins)
        )


class Calibration:
    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, windows: Sequence[Tensor]
    ) -> None:
        self._tensors = _ReplacedTensors(checkpoint, config, lambda num_bytes: None)
        self._tensors.replaced = {}
        self._model = LayerwiseModel(config, self._tensors, windows)
        spec = self._model.spec
        self._ops = [*spec.ops, *spec.head_ops]
        self._next = 0

    @torch.inference_mode()
    def moments(self, name: str) -> Moments | None:
        """Of what the product with this weight reads. None: its inputs are no activations of one
        product (an embedding, also one that is the head's table too).

        Weights are asked for in the order that the model uses them, and replaced before the next.
        """
        users = [i for i, op in enumerate(self._ops) if name in _names(op)]
        first = users[0]
        while self._next < first:
            self._model.run(self._ops[self._next])
            for used in _names(self._ops[self._next]):
                self._tensors.replaced.pop(used, None)
            self._next += 1
        op = self._ops[first]
        if len(users) > 1 or not isinstance(op, Linear) or self._next > first:
            return None
        return Moments.of(self._model.step.buffers[op.x])

    def replace(self, name: str, weight: QuantizedLinear) -> None:
        self._tensors.replaced[name] = weight


def _names(op: Op) -> list[str]:
    values = [getattr(op, item.name) for item in dataclasses.fields(op)]
    return [value for value in values if isinstance(value, str)]
