"""An adapter's matrices stacked as a model's products are fused: one pair for each product.

Knows which tensors a product is fused of, not how an executor multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.lora.peft import LoraAdapter
from torchweave_ray.models.spec import DecoderSpec, Executor, Experts, GatedActivation, Linear
from torchweave_ray.models.tensors import FusedTensor

MAX_STACKED = 3
"""Products fused into one: q, k and v."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """out += x @ a.T @ b.T"""

    a: Tensor  # [r, k] float32, of a fused product one below the other
    b: Tensor  # [n, r] float32, scaled; of a fused product the blocks of a diagonal


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    pairs: Mapping[str, LoraPair]
    """By name of the artifact's tensor."""
    rank: int
    """The largest of a product that is not fused."""


@runtime_checkable
class Adaptable(Executor, Protocol):
    """An executor whose products adapters may add to."""

    def load_adapter(self, adapter: FittedAdapter) -> object:
        """What `AdapterRows` of its batches name. Any thread may call."""
        ...


def fit(adapter: LoraAdapter, tensors: Sequence[FusedTensor]) -> FittedAdapter:
    """`tensors`: the model's. Raises ArtifactError naming what does not fit it."""
    pairs: dict[str, LoraPair] = {}
    left = dict(adapter.targets)
    for tensor in tensors:
        if tensor.group != "layers" or tensor.num_experts > 1 or not left.keys() & tensor.sources:
            continue
        columns, blocks, start = [], [], 0
        for name, shape in zip(tensor.sources, tensor.source_shapes, strict=True):
            if (found := left.pop(name, None)) is not None:
                if found != shape:
                    raise ArtifactError(
                        f"it changes {name} of {[*found]}, the model's is {[*shape]}"
                    )
                a, b = adapter.matrices(name)
                columns.append(a)
                blocks.append((start, b))
            start += shape[0]
        stacked = torch.zeros(start, sum(len(a) for a in columns))
        rank = 0
        for row, b in blocks:
            stacked[row : row + b.shape[0], rank : rank + b.shape[1]] = b
            rank += b.shape[1]
        pairs[tensor.name] = LoraPair(torch.cat(columns).float(), stacked)
    if left:
        name = min(left)
        raise ArtifactError(
            f"it changes {name}: only the products of attention and of a dense MLP are changed "
            f"while they run ({len(left)} such in all)"
        )
    return FittedAdapter(pairs, adapter.rank)


def adaptable(spec: DecoderSpec) -> dict[str, bool]:
    """Weights that an adapter may add to, in order; True: of gates and ups, side by side."""
    routers = {op.router for op in spec.ops if isinstance(op, Experts)}
    found: dict[str, bool] = {}
    for op, after in zip(spec.ops, (*spec.ops[1:], None), strict=True):
        if isinstance(op, Linear) and op.out not in routers:
            found[op.weight] = isinstance(after, GatedActivation) and after.x == op.out
    return found
