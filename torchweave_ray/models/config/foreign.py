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
        **_sliding(found, shape["num_layers"]),
        "foreign": ForeignConfig(shapes, {k: v for k, v in config.items() if k != KEY}),
    }


def _sliding(found: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Which layers slide, and over how much at most. One staged before this was asked tells not."""
    windows = found.get("sliding_windows")
    if windows is None:
        return {}
    if not isinstance(windows, list) or len(windows) != num_layers:
        raise refused(f"{KEY}.sliding_windows", windows, f"must list {num_layers} layers")
    for window in windows:
        if window is not None and (type(window) is not int or window < 1):
            raise refused(f"{KEY}.sliding_windows", window, "must be positions, or null for all")
    return {
        "sliding_window": max((window for window in windows if window), default=None),
        "sliding_layers": tuple(window is not None for window in windows),
    }
