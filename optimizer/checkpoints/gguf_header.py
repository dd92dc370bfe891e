"""Walks a GGUF's header before the gguf package reads it: no length, count or offset leads beyond
the file. The package trusts them, and would loop or slice by what a broken file says.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows no keys and no models.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import gguf

from torchweave_ray.errors import ArtifactError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type."""
_MAX_KEY = 1 << 16
_MAX_NAME = 256
"""Of a tensor; ggml keeps 64."""
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4
_ALIGNMENT = 32
_ALIGNMENT_KEY = b"general.alignment"


def check_header(path: Path) -> None:
    """Raises ArtifactError saying what in the file leads where it must not."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).check()
    except _Broken as error:
        raise ArtifactError(f"{path} is not a whole GGUF file: {error}") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ArtifactError(f"{path} is not a whole GGUF file: {error}") from error


class _Broken(Exception):
    pass


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), 0
        self._alignment = _ALIGNMENT

    def check(self) -> None:
        if self._take(4) != _MAGIC:
            raise _Broken("it does not begin with GGUF")
        version = self._u32()
        if version not in _VERSIONS:
            raise _Broken(f"version {version} is not 2 or 3 in little-endian order")
        num_tensors, num_pairs = self._u64(), self._u64()
        for what, count, least in (("tensors", num_tensors, 32), ("keys", num_pairs, 13)):
            if count * least > self._size:
                raise _Broken(f"{count} {what} are more than it has room for")
        for _ in range(num_pairs):
            self._pair()
        ends = [self._tensor() for _ in range(num_tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        for name, end in ends:
            if start + end > self._size:
                raise _Broken(f"tensor {name!r} ends at byte {start + end} of {self._size}")

    def _pair(self) -> None:
        key, kind = self._string(_MAX_KEY), self._u32()
        at = self._at
        self._value(kind, 0)
        if key == _ALIGNMENT_KEY:
            value = struct.unpack_from("<I", self._data, at)[0] if kind == 4 else 0
            if value == 0 or value & (value - 1):
                raise _Broken("general.alignment is no power of two")
            self._alignment = value

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _STRING:
            self._skip(self._u64())
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            item, count = self._u32(), self._u64()
            if item in _SCALARS:
                self._skip(count * _SCALARS[item])
                return
            if count * 8 > self._size:
                raise _Broken(f"an array of {count} at byte {self._at} is larger than the file")
            for _ in range(count):
                self._value(item, depth + 1)
        else:
            raise _Broken(f"a value of type {kind} at byte {self._at}")

    def _tensor(self) -> tuple[str, int]:
        """Its name, and where it ends behind the start of the data."""
        name = self._string(_MAX_NAME).decode(errors="replace")
        num_dimensions = self._u32()
        if num_dimensions > _MAX_DIMENSIONS:
            raise _Broken(f"tensor {name!r} has {num_dimensions} dimensions")
        count = 1
        for _ in range(num_dimensions):
            count *= self._u64()
        kind, offset = self._u32(), self._u64()
        try:
            block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (KeyError, ValueError) as error:
            raise _Broken(f"tensor {name!r} is of type {kind}, which is none") from error
        if offset % self._alignment:
            raise _Broken(f"tensor {name!r} is not aligned")
        return name, offset + -(-count // block) * num_bytes

    def _string(self, limit: int) -> bytes:
        length = self._u64()
        if length > limit:
            raise _Broken(f"a name of {length} bytes at byte {self._at}")
        return self._take(length)

    def _u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _take(self, count: int) -> bytes:
        start = self._at
        self._skip(count)
        return self._data[start : self._at]

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise _Broken(f"{count} bytes at byte {self._at} are beyond its {self._size}")
        self._at += count
