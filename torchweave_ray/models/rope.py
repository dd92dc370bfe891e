"""Rotary frequencies: all scaling of a checkpoint's rope settings, once, when a spec is built."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchweave_ray.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[float, ...]:
    """[rotary_dim / 2] angles a position. Rounded to fp32 as the models were trained with."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    inv_freq = 1.0 / rope.theta**exponents
    match rope.type:
        case "default":
            pass
        case "linear":
            inv_freq = inv_freq / rope.factor
        case "llama3":
            inv_freq = _llama3(rope, inv_freq)
        case "yarn":
            inv_freq = _yarn(rope, inv_freq, rotary_dim)
        case "longrope":  # LongRoPE, https://arxiv.org/abs/2402.13753
            inv_freq = 1.0 / (torch.tensor(rope.factors) * rope.theta**exponents)
    return tuple(inv_freq.tolist())


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1,
    `apply_scaling` of Meta's llama-models)."""
    trained = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / inv_freq
    blend = (trained / wavelengths - low) / (high - low)
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    scaled = torch.where(wavelengths > trained / low, inv_freq / rope.factor, blended)
    return torch.where(wavelengths < trained / high, inv_freq, scaled)


def _yarn(rope: RopeConfig, inv_freq: Tensor, rotary_dim: int) -> Tensor:
    """Dimensions that turn more than beta_fast times over the trained length are kept, those below
    beta_slow stretched, a ramp between (YaRN, https://arxiv.org/abs/2309.00071)."""

    def dimension(turns: float) -> float:
        span = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)
