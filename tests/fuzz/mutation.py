"""Inputs that are nearly right: bytes and JSON changed at random, from a seed. No test in here."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

NUMBERS = (
    *(-1, 0, 1, 2, 7, 255, 256, 65_535, 65_536),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40),
    *((1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
TEXTS = (
    *("", " ", "\0", "x", "../x", "/etc/passwd", "..", "a/b", "%2e%2e/x", "\ud800", "\N{BOM}"),
    *("0", "-1", "NaN", "__proto__", "F32", "I8", "{{ 7 }}", "<|im_end|>", "[" * 50, "x" * 5_000),
)
DEEP: Any = None
for _ in range(40):
    DEEP = [DEEP]


def mutated_bytes(data: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    """One to four changes. `places`: offsets where numbers begin that lead somewhere."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.choice(places) if places and rng.random() < 0.7 else rng.randrange(len(data))
        kind = rng.randrange(8)
        if kind < 3:
            width = rng.choice((1, 4, 8))
            number = rng.choice(NUMBERS) + rng.choice((0, 0, -1, 1, rng.randrange(100)))
            changed[at : at + width] = struct.pack("<q", _wrapped(number))[:width]
        elif kind == 3 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 4:
            changed[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 5:
            del changed[at : at + rng.randrange(1, 40)]
        elif kind == 6:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutated(value: Any, rng: random.Random, others: Sequence[Any] = ()) -> Any:
    """Parsed JSON with one to four changes of its structure. `others`: values worth trying."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(value, rng, others)
    return value


def hostile(rng: random.Random, others: Sequence[Any] = ()) -> Any:
    if others and rng.random() < 0.3:
        return rng.choice(others)
    scalars: tuple[Any, ...] = (None, True, False, 0.5, -0.0, 1e308, float("inf"), float("nan"))
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice(scalars)
    if kind == 3:
        return rng.choice(([], {}, [[]], DEEP, {"": None}, [0] * 300))
    return [hostile(rng), hostile(rng)]


def _changed(value: Any, rng: random.Random, others: Sequence[Any]) -> Any:
    """A copy in which one node somewhere is another, gone, or there twice."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return _neighbour(value, rng) if rng.random() < 0.3 else hostile(rng, others)
    copied = dict(value) if isinstance(value, dict) else list(value)
    key: Any = rng.choice(list(copied)) if isinstance(copied, dict) else rng.randrange(len(copied))
    kind = rng.randrange(10)
    if kind == 0:
        del copied[key]
    elif kind == 1 and isinstance(copied, dict):
        copied[rng.choice((str(key) + "x", str(key).upper(), *TEXTS))] = copied[key]
    elif kind == 1:
        copied.insert(key, copied[key])
    else:
        copied[key] = _changed(copied[key], rng, others)
    return copied


def _neighbour(value: Any, rng: random.Random) -> Any:
    """Wrong by a little."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice((-1, 1, 0.5, value, -value, -2 * value))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(TEXTS) + value[at + rng.randrange(2) :]
    return [value]


def _wrapped(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
