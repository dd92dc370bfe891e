"""A step's batch on its way to the other ranks: what it is, and all its tensors in one piece.

Whatever tensors and numbers `StepInputs` has travel; knows not what they mean.
"""

from __future__ import annotations

from dataclasses import fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from torchweave_ray.attention.base import StepInputs

Header = dict[str, Any]
_LEFT_OUT = ("adapters", "packed")
"""There are no adapters here, and pieces of memory for graphs mean nothing elsewhere."""
_DTYPES = {"int64": torch.int64, "int32": torch.int32}
"""The wider ones come first, so that all are aligned."""


def packed(inputs: StepInputs) -> tuple[Header, Tensor]:
    """Header for JSON, and the tensors one behind the other: [bytes] uint8."""
    assert not inputs.adapters
    header: Header = {"tensors": [], "numbers": {}}
    found: list[tuple[str, str, Tensor]] = []
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if field.name in _LEFT_OUT:
            continue
        if isinstance(value, Tensor):
            found.append((field.name, str(value.dtype).removeprefix("torch."), value))
        else:
            header["numbers"][field.name] = value
    found.sort(key=lambda entry: list(_DTYPES).index(entry[1]))
    header["tensors"] = [[name, dtype, list(value.shape)] for name, dtype, value in found]
    pieces = [value.reshape(-1).contiguous().view(torch.uint8) for _, _, value in found]
    return header, torch.cat(pieces)


def num_bytes(header: Header) -> int:
    return sum(prod(shape) * _DTYPES[dtype].itemsize for _, dtype, shape in header["tensors"])


def unpacked(header: Header, piece: Tensor) -> StepInputs:
    """What was packed, over the memory of `piece`."""
    tensors: dict[str, Any] = {}
    start = 0
    for name, dtype, shape in header["tensors"]:
        end = start + prod(shape) * _DTYPES[dtype].itemsize
        tensors[name] = piece[start:end].view(_DTYPES[dtype]).view(shape)
        start = end
    return StepInputs(**tensors, **header["numbers"])
