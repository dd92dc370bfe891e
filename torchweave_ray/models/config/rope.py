"""A config's rotary embedding, in the old layout (`rope_theta`, `rope_scaling`) and in that of
transformers 5 (`rope_parameters`). What it means for frequencies is models/rope.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchweave_ray.models.config.keys import flag, integer, positive, refused

RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]
_ORIGINAL = "original_max_position_embeddings"
_YARN = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}
_ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
    "yarn": frozenset({"factor", _ORIGINAL, *_YARN}),
    "longrope": frozenset({"factor", _ORIGINAL, "short_factor", "long_factor", "attention_factor"}),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `factor` and what follows only count for the types that name them."""

    theta: float = 10_000.0
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: the corrected range ends at whole dimensions."""
    factors: tuple[float, ...] = ()
    """longrope: a divisor of each frequency."""
    attention_scaling: float = 1.0
    """Multiplies cos and sin (yarn, longrope)."""


def read_rope(
    config: Mapping[str, Any],
    max_positions: int,
    rotary_dim: int,
    default_theta: float = 10_000.0,
) -> RopeConfig:
    """`rotary_dim`: how many dimensions of a head turn. Raises ArtifactError naming the key."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    values = config.get(key) or {}
    if not isinstance(values, Mapping):
        raise refused(key, values, "must be an object")
    rope_type = _rope_type(key, values)
    known = _ROPE_KEYS[rope_type] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name in values:
        if name not in known:
            raise refused(f"{key}.{name}", values[name], f"is no key of rope type {rope_type!r}")
    outer, inner = config.get("rope_theta"), values.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise refused("rope_theta", outer, f"contradicts {key}.rope_theta {inner!r}")
    theta = {"rope_theta": inner if outer is None else outer}
    rope = RopeConfig(positive(theta, "rope_theta", default_theta), rope_type)
    match rope_type:
        case "default":
            return rope
        case "linear":
            return replace(rope, factor=positive(values, "factor", where=key))
        case "llama3":
            return _llama3(rope, values, key, max_positions)
        case "yarn":
            return _yarn(rope, values, key, max_positions)
        case "longrope":
            # Phi-3 has it outside.
            original = {_ORIGINAL: config.get(_ORIGINAL), **values}
            return _longrope(rope, original, key, max_positions, rotary_dim)


def _rope_type(key: str, values: Mapping[str, Any]) -> RopeType:
    rope_type = values.get("rope_type", values.get("type", "default"))
    rope_type = {"su": "longrope"}.get(rope_type, rope_type) if type(rope_type) is str else None
    if rope_type == "dynamic":
        raise refused(
            f"{key}.rope_type",
            rope_type,
            "is not supported: its angles depend on the longest text of a batch",
        )
    for known in _ROPE_KEYS:
        if rope_type == known:
            break
    else:
        raise refused(f"{key}.rope_type", rope_type, f"is not one of {', '.join(_ROPE_KEYS)}")
    other = values.get("type", rope_type)
    if other not in (rope_type, "su" if rope_type == "longrope" else rope_type):
        raise refused(f"{key}.type", other, f"contradicts rope_type {rope_type!r}")
    return known  # type: ignore[return-value]


def _llama3(
    rope: RopeConfig, values: Mapping[str, Any], key: str, max_positions: int
) -> RopeConfig:
    low = positive(values, "low_freq_factor", where=key)
    high = positive(values, "high_freq_factor", where=key)
    if high <= low:
        raise refused(f"{key}.high_freq_factor", high, f"must be above low_freq_factor {low}")
    return replace(
        rope,
        factor=positive(values, "factor", where=key),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=integer(values, _ORIGINAL, max_positions, where=key),
    )


def _yarn(rope: RopeConfig, values: Mapping[str, Any], key: str, max_positions: int) -> RopeConfig:
    factor = positive(values, "factor", where=key)
    mscale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if values.get("attention_factor") is not None:
        scaling = positive(values, "attention_factor", where=key)
    elif mscale and all_dim:
        scaling = _mscale(factor, positive(values, "mscale", where=key))
        scaling /= _mscale(factor, positive(values, "mscale_all_dim", where=key))
    else:
        scaling = _mscale(factor)
    return replace(
        rope,
        factor=factor,
        original_max_position_embeddings=integer(values, _ORIGINAL, max_positions, where=key),
        beta_fast=positive(values, "beta_fast", 32.0, where=key),
        beta_slow=positive(values, "beta_slow", 1.0, where=key),
        truncate=flag(values, "truncate", default=True),
        attention_scaling=scaling,
    )


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(
    rope: RopeConfig, values: Mapping[str, Any], key: str, max_positions: int, rotary_dim: int
) -> RopeConfig:
    """One set of divisors for every text, short or long: transformers changes to the long ones
    when a batch passes the trained length, which would make a text depend on its neighbours."""
    original = integer(values, _ORIGINAL, max_positions, where=key)
    name = "long_factor" if max_positions > original else "short_factor"
    factors = values.get(name)
    wanted = rotary_dim // 2
    if (
        not isinstance(factors, list)
        or len(factors) != wanted
        or not all(type(f) in (int, float) and 0 < f < math.inf for f in factors)
    ):
        raise refused(f"{key}.{name}", factors, f"must list {wanted} numbers above 0")
    factor = positive(values, "factor", max_positions / original, where=key)
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return replace(
        rope,
        factor=factor,
        original_max_position_embeddings=original,
        factors=tuple(float(f) for f in factors),
        attention_scaling=positive(values, "attention_factor", scaling, where=key),
    )
