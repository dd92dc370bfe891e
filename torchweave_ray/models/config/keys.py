"""Values of a `config.json`, one key at a time: of the right type and range, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import CONFIG


def integer(
    values: Mapping[str, Any], key: str, default: int | None = None, where: str = ""
) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise refused(f"{where}.{key}" if where else key, value, "must be an integer above 0")
    return value


def positive(
    values: Mapping[str, Any], key: str, default: float | None = None, where: str = ""
) -> float:
    value: Any = values.get(key)
    value = default if value is None else value
    number = float(value) if type(value) in (int, float) else 0.0
    if not 0.0 < number < float("inf"):
        raise refused(f"{where}.{key}" if where else key, value, "must be a number above 0")
    return number


def optional_positive(values: Mapping[str, Any], key: str) -> float | None:
    return None if values.get(key) is None else positive(values, key)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise refused(key, value, "must be true or false")
    return default if value is None else value


def per_layer(
    config: Mapping[str, Any], key: str, num_layers: int, known: Mapping[Any, bool]
) -> tuple[bool, ...]:
    """A list with one of `known` for each layer, as what they stand for."""
    values = config[key]
    if not isinstance(values, list) or len(values) != num_layers:
        raise refused(key, values, f"must list one value for each of {num_layers} layers")
    for value in values:
        if not isinstance(value, str | int) or value not in known:
            raise refused(key, value, f"is not one of {', '.join(str(name) for name in known)}")
    return tuple(known[value] for value in values)


def refused(key: str, value: object, why: str) -> ArtifactError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ArtifactError(f"{CONFIG}: {key} = {shown} {why}")
