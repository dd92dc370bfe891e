"""Random JSON schemas whose texts are bounded in size, so that an answer always ends: no test."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "age", "city", "tags", "größe", "is ok", "id", "x-y", 'quo"te', "value")
_SPACE = 17
"""Characters of blanks between two tokens of JSON, at most."""
_CHAR = 12
"""Bytes of one character of a string, at most: two escapes of six."""


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    flat = [_enum, _integer, _string, _formatted, _flag]
    deep = [_array, _object, _object, _either]
    return rng.choice([*flat, *deep * 2] if depth else flat)(rng, depth)


def max_bytes(schema: dict[str, Any]) -> int:
    """No text of the schema has more bytes, so no more tokens."""
    if "enum" in schema:
        return max(len(repr(value)) for value in schema["enum"]) * _CHAR
    if "anyOf" in schema:
        return max(map(max_bytes, schema["anyOf"]))
    if schema["type"] == "array":
        return 2 + schema["maxItems"] * (max_bytes(schema["items"]) + 1 + 2 * _SPACE) + _SPACE
    if schema["type"] == "object":
        properties = schema["properties"].items()
        size = sum(len(key) * _CHAR + 4 + 3 * _SPACE + max_bytes(s) for key, s in properties)
        return size + 2 + _SPACE
    return 2 + schema.get("maxLength", 30) * _CHAR


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = ["red", "grün", 'a "b"', 3, -1.5, None, True, {"k": [1, "z"]}, ""]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 7, 5000])}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    longest = rng.randint(0, 12)
    return {"type": "string", "minLength": rng.randint(0, longest), "maxLength": longest}


def _formatted(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
            {"type": "string", "pattern": "^(yes|no|maybe)( please)?$"},
            {"type": "string", "format": "date"},
        ]
    )


def _flag(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    most = rng.randint(0, 3)
    items = random_schema(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": rng.randint(0, most), "maxItems": most}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
