"""Rotary frequencies: all scaling of a checkpoint's rope settings, once, when a spec is built."""

from __future__ import annotations

import math

import torch

from torchweave_ray.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[float, ...]:
    """[head_dim / 2] angles a position. Rounded to fp32 as the models were trained with.

    llama3: long waves are stretched by `factor`, short ones kept, those between blended
    (Llama 3.1, `apply_scaling` of Meta's llama-models).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / rope.theta**exponents
    if rope.type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.type == "llama3":
        trained = rope.original_max_position_embeddings
        low, high = rope.low_freq_factor, rope.high_freq_factor
        wavelengths = 2 * math.pi / inv_freq
        blend = (trained / wavelengths - low) / (high - low)
        blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
        scaled = torch.where(wavelengths > trained / low, inv_freq / rope.factor, blended)
        inv_freq = torch.where(wavelengths < trained / high, inv_freq, scaled)
    return tuple(inv_freq.tolist())
