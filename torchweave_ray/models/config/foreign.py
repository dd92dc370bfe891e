"""A model of no family of ours: what was found out about it when it was staged (hf/gate.py).

It stands in the artifact's config.json under a key of its own, so that a replica need not find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchweave_ray.models.config.keys import integer, refused

KEY = "torchweave_transformers"


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """transformers computes it; `tensors`: (name, shape) as its checkpoint has them."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    hf_config: Mapping[str, Any]


def read_foreign(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ModelConfig. Raises ArtifactError naming the key."""
    found = config[KEY]
    tensors = found.get("tensors") if isinstance(found, Mapping) else None
    if not isinstance(tensors, Mapping):
        raise refused(KEY, found, "must be an object with tensors")
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    shape = {name: integer(found, name, where=KEY) for name in names}
    shapes = tuple((str(name), tuple(int(n) for n in dims)) for name, dims in tensors.items())
    return {
        **shape,
        "max_position_embeddings": integer(found, "max_position_embeddings", where=KEY),
        "foreign": ForeignConfig(shapes, {k: v for k, v in config.items() if k != KEY}),
    }
