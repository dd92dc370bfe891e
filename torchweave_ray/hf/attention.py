"""Paged attention as one of transformers' attention functions. Knows no models.

transformers makes no mask for a function that its mask interface does not know. What a model hands
over that we would not compute is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from torchweave_ray.attention.base import AttentionBackend, AttentionShape, LayerKV, StepInputs
from torchweave_ray.errors import ArtifactError

NAME = "torchweave_paged"


class Attending(Protocol):
    """What a forward is called with as `torchweave_step`."""

    def attend(
        self, layer: int, shape: AttentionShape, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """All [T, heads, head_dim]."""
        ...


@dataclass(slots=True)
class PagedStep:
    """One step's batch."""

    inputs: StepInputs
    kv: Sequence[LayerKV]
    attention: AttentionBackend
    layers: list[int] = field(default_factory=list)

    def attend(
        self, layer: int, shape: AttentionShape, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        self.layers.append(layer)
        kv = self.kv[layer]
        self.attention.write_kv(keys, values, kv, self.inputs)
        return self.attention.forward(queries.contiguous(), kv, self.inputs, shape)


@dataclass(slots=True)
class Probe:
    """Computes nothing, and keeps what each layer asks for."""

    shapes: dict[int, AttentionShape] = field(default_factory=dict)

    def attend(
        self, layer: int, shape: AttentionShape, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        if layer in self.shapes:
            raise ArtifactError(f"layer {layer} attends more than once")
        if values.shape != keys.shape:
            raise ArtifactError("its keys and values are of different sizes")
        self.shapes[layer] = shape
        return torch.empty_like(queries)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    torchweave_step: Attending | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, head_dim] -> [1, T, heads, head_dim]. Raises ArtifactError."""
    if torchweave_step is None:
        raise ArtifactError("its attention does not hand on what its forward is called with")
    if attention_mask is not None:
        raise ArtifactError("its attention has a mask of its own")
    for name in ("s_aux", "position_bias", "head_mask"):
        if others.get(name) is not None:
            raise ArtifactError(f"its attention asks for {name}")
    layer = getattr(module, "layer_idx", None)
    if type(layer) is not int:
        raise ArtifactError("its attention does not say which layer it is of")
    heads, head_dim = query.shape[1], query.shape[3]
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    shape = AttentionShape(heads, key.shape[1], head_dim, scale, sliding_window, softcap)
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return torchweave_step.attend(layer, shape, *rows)[None], None


AttentionInterface.register(NAME, paged_attention)
