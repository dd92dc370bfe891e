"""A safetensors file as views of its mapped pages, in huge pages where the system has them.

Kernels stream weights: small pages stop the processor's prefetcher at every page's end. Linux gives
a file huge pages in the page cache (all processes share them) when its file system has large folios
(XFS, ext4 since 6.16) and the file is first read through a mapping that asked for them.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import warnings
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchweave_ray.errors import ArtifactError

_READ = 1  # PROT_READ
_CACHE_LINE = 64
_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def map_file(path: Path) -> Tensor:
    """The whole file [bytes] uint8; it lives as long as a view of it. Writing to it does not reach
    the file. Raises ArtifactError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def map_shared(memory: NDArray[np.uint8]) -> Tensor:
    """Memory [bytes] that other processes map too, as it lies; it lives as long as a view of it.

    Its pages become read-only for this process: an op in place would change everybody's weights.
    Kernels want tensors on cache lines; a buffer that is not is copied.
    """
    if memory.ctypes.data % _CACHE_LINE:
        copied = torch.empty(memory.nbytes, dtype=torch.uint8)  # torch allocates on cache lines
        copied.numpy()[:] = memory
        return copied
    first = -(-memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    num_bytes = (memory.ctypes.data + memory.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if num_bytes > 0 and libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), _READ):
        raise ArtifactError(f"weights cannot be protected: {os.strerror(ctypes.get_errno())}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(memory)


def tensors_in(whole: Tensor, where: str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, views of its bytes: whole [bytes] uint8.

    Raises ArtifactError, beginning with `where`, for a header that does not fit the bytes.
    """
    try:
        (length,) = struct.unpack("<Q", whole[:8].numpy().tobytes())
        start = 8 + length
        if start > len(whole):
            raise ValueError(f"a header of {length} bytes in a file of {len(whole)}")
        header = json.loads(whole[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        return {name: _view(whole[start:], name, **entry) for name, entry in header.items()}
    except (struct.error, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} cannot be read: {error}") from error


def _view(data: Tensor, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    first, last = data_offsets
    kind: Any = _DTYPES.get(dtype)
    if kind is None:
        raise ValueError(f"tensor {name} has dtype {dtype}")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, first, last)):
        raise ValueError(f"tensor {name} has no shape and offsets that a file can have")
    if not 0 <= first <= last <= len(data) or last - first != prod(shape) * kind.itemsize:
        raise ValueError(f"tensor {name} is cut: bytes {first} to {last} of {len(data)}")
    found = data[first:last]
    if found.storage_offset() % kind.itemsize:  # another writer's: ours align
        found = found.clone()
    return found.view(kind).view(shape)


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
    map_file(path)[:: mmap.PAGESIZE].sum()
