"""A checkpoint with LoRA adapters merged into its weights. models/lora/peft.py reads them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from optimizer.checkpoints.checkpoint import Checkpoint, TensorInfo
from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.quantization import QuantizedLinear
from torchweave_ray.models.lora.peft import LoraAdapter


class MergedCheckpoint:
    """`base` with adapters added, in their order. Tensors that none changes are the base's."""

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[LoraAdapter, float]]) -> None:
        self._base, self._adapters = base, adapters
        for adapter, _ in adapters:
            for name, shape in adapter.targets.items():
                held = base.tensors.get(name)
                if held is None:
                    close = difflib.get_close_matches(name, base.tensors, n=1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise ArtifactError(f"an adapter changes {name}, the model has none{hint}")
                if held.shape != shape:
                    raise ArtifactError(
                        f"an adapter's {name} is {list(shape)}, the model's {list(held.shape)}"
                    )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._base.tensors

    def load(self, name: str) -> Tensor:
        """float32 where it was changed."""
        weight = self._base.load(name)
        if not self._changes(name):
            return weight
        merged = torch.empty(weight.shape, dtype=torch.float32).copy_(weight)
        for adapter, scale in self._adapters:
            if name in adapter.targets:
                adapter.add(name, merged, scale)
        return merged

    def codes(self, name: str) -> QuantizedLinear | None:
        return None if self._changes(name) else self._base.codes(name)

    def documents(self) -> dict[str, bytes]:
        return self._base.documents()

    def check_read(self, names: Collection[str]) -> None:
        """Raises ArtifactError if an adapter changes what the model does not read."""
        for adapter, _ in self._adapters:
            for name in adapter.targets:
                if name not in names:
                    raise ArtifactError(
                        f"an adapter changes {name}, which this model does not read"
                        " (a tied head is the embedding)"
                    )

    def _changes(self, name: str) -> bool:
        return any(name in adapter.targets for adapter, _ in self._adapters)
