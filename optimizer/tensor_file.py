"""Writes a safetensors file tensor by tensor, so that memory holds one tensor at a time.

Format: https://huggingface.co/docs/safetensors: header length, JSON header, data without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
_ALIGNMENT = 4096  # of the data in the file: readers map it and use it in place


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    shape: tuple[int, ...]


def write_tensors(
    path: Path,
    dtype: str,
    entries: Sequence[Entry],
    parts: Iterable[Tensor],
    advance: Callable[[int], None],
) -> None:
    """Write `entries` in this order. `parts` are tensors whose data follow one another: a tensor
    concatenated along its first axis may come in pieces. Equal arguments give equal bytes.
    """
    code, torch_dtype = _DTYPES[dtype]
    header, total = _header(code, torch_dtype.itemsize, entries)
    written = 0
    with path.open("wb") as file:
        file.write(header)
        for part in parts:
            data = part.to(torch_dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data.data)
            written += data.nbytes
            advance(data.nbytes)
    assert written == total


def _header(code: str, itemsize: int, entries: Sequence[Entry]) -> tuple[bytes, int]:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + itemsize * torch.Size(entry.shape).numel()
        fields[entry.name] = {
            "dtype": code,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, offset
