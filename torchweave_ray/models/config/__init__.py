"""A model's `config.json`, read strictly: what we compute from it is right or it is refused."""

from __future__ import annotations

from torchweave_ray.models.config.families import ExpertsConfig
from torchweave_ray.models.config.foreign import KEY as FOREIGN_KEY
from torchweave_ray.models.config.model import (
    ACTIVATIONS,
    SUPPORTED_ARCHITECTURES,
    ModelConfig,
    eos_token_ids,
)
from torchweave_ray.models.config.rope import RopeConfig

__all__ = [
    "ACTIVATIONS",
    "FOREIGN_KEY",
    "SUPPORTED_ARCHITECTURES",
    "ExpertsConfig",
    "ModelConfig",
    "RopeConfig",
    "eos_token_ids",
]
