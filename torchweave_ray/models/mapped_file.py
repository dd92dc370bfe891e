"""A safetensors file as views of its mapped pages, in huge pages where the system has them.

Kernels stream weights: small pages stop the processor's prefetcher at every page's end. Linux gives
a file huge pages in the page cache (all processes share them) when its file system has large folios
(XFS, ext4 since 6.16) and the file is first read through a mapping that asked for them.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "U8": torch.uint8,
}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file whose header is known to be whole (`safetensors.safe_open` checks it).
    Tensors of dtypes that no weight has are left out. Writing to them does not reach the file.
    """
    whole = _map(path)
    (length,) = struct.unpack("<Q", whole[:8].numpy().tobytes())
    start = 8 + length
    header = json.loads(whole[8:start].numpy().tobytes())
    tensors = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry.get("dtype"))
        if dtype is not None:
            first, last = entry["data_offsets"]
            data = whole[start + first : start + last]
            tensors[name] = data.view(dtype).view(entry["shape"])
    return tensors


def cache_in_huge_pages(path: Path) -> None:
    """Read a file that was just written into the page cache anew, in huge pages if it can be.

    What other processes have mapped stays as it is. Its writer must have synced it.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    _map(path)[:: mmap.PAGESIZE].sum()


def _map(path: Path) -> Tensor:
    """The whole file [bytes] uint8; it lives as long as a view of it."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
