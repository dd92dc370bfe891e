"""Writes a safetensors file tensor by tensor, so that memory holds one tensor at a time.

Format: https://huggingface.co/docs/safetensors: header length, JSON header, data without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchweave_ray.models.tensors import StoredTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""By the manifest's word: what a model may be computed in."""
_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_ALIGNMENT = 4096  # of the data in the file: readers map it and use it in place


def write_tensors(
    path: Path,
    entries: Sequence[StoredTensor],
    parts: Iterable[Tensor],
    advance: Callable[[int], None],
) -> None:
    """Write `entries` in this order. `parts` are tensors whose data follow one another, each of
    one entry: a tensor concatenated along its first axis may come in pieces, and floats in another
    dtype than they are written in. Equal arguments give equal bytes.
    """
    header, total = _header(entries)
    written = 0
    left = list(entries)
    room = _size(left[0]) if left else 0
    with path.open("wb") as file:
        file.write(header)
        for part in parts:
            if room == 0:
                left.pop(0)
                room = _size(left[0])
            data = part.to(left[0].dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data.data)
            room -= data.nbytes
            written += data.nbytes
            advance(data.nbytes)
    assert (written, room) == (total, 0)


def _size(entry: StoredTensor) -> int:
    return entry.dtype.itemsize * torch.Size(entry.shape).numel()


def _header(entries: Sequence[StoredTensor]) -> tuple[bytes, int]:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + _size(entry)
        fields[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, offset
