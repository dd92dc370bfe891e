"""Writes a safetensors file tensor by tensor, so that memory holds little more than one tensor.

Format: https://huggingface.co/docs/safetensors: header length, JSON header, data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from optimizer.disk_space import needing
from optimizer.store import write_atomically
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
_PIECE = 4 << 20
"""Elements that are brought into the file's dtype at once."""


class TensorWriter:
    """A context manager that writes `entries` in their order. Equal arguments give equal bytes.

    With a `key` that names what the tensors are made of, a run that was killed is continued: it
    left entries 0..num_done-1 on the disk. Raises ArtifactError for a disk that is or gets full.
    """

    sync_bytes = 256 << 20
    """Written between two notes of how far it is."""

    def __init__(
        self,
        path: Path,
        entries: Sequence[StoredTensor],
        advance: Callable[[int], None],
        key: str | None = None,
    ) -> None:
        self._path, self._entries, self._advance = path, entries, advance
        self._header, self._total = _header(entries)
        digest = hashlib.sha256(self._header + (key or "").encode()).hexdigest()
        self._key = None if key is None else digest
        self._note = path.with_name(f"{path.name}.progress")
        self.num_done, self._written = self._left_by_a_killed_run()
        self._noted = self._written
        self._room = self._size(self.num_done)
        self._stack = ExitStack()

    def __enter__(self) -> TensorWriter:
        self._file = self._stack.enter_context(self._path.open("r+b" if self._written else "wb"))
        self._file.truncate(len(self._header) + self._written if self._written else 0)
        left = self._total - self._written
        self._stack.enter_context(needing(self._path.parent, left, self._path.parent.name))
        self._file.seek(0, os.SEEK_END)
        if not self._written:
            self._file.write(self._header)
        self._advance(self._written)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            assert (self.num_done, self._written) == (len(self._entries), self._total)
            self._note.unlink(missing_ok=True)
        self._stack.__exit__(kind, error, traceback)

    def write(self, part: Tensor) -> None:
        """The next data of the entry that is due: all of it, or a part along the first axis.
        Floats may come in another dtype than they are written in."""
        dtype = self._entries[self.num_done].dtype
        flat = part.contiguous().reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            data = flat[start : start + _PIECE].to(dtype).view(torch.uint8).numpy()
            self._file.write(data.data)
            self._room -= data.nbytes
            self._written += data.nbytes
            self._advance(data.nbytes)
        assert self._room >= 0
        if self._room == 0:
            self.num_done += 1
            self._room = self._size(self.num_done)
            if self._key is not None and self._written - self._noted >= self.sync_bytes:
                self._write_note()

    def read(self, index: int) -> Tensor:
        """An entry that is on the disk already, of a run that is continued."""
        assert index < self.num_done
        entry = self._entries[index]
        start = len(self._header) + sum(map(_size, self._entries[:index]))
        self._file.flush()
        with self._path.open("rb") as file:
            file.seek(start)
            data = bytearray(file.read(_size(entry)))
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def _write_note(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        write_atomically(self._note, json.dumps([self._key, self.num_done, self._written]))
        self._noted = self._written

    def _left_by_a_killed_run(self) -> tuple[int, int]:
        """How many entries and bytes of data the file holds for certain."""
        try:
            key, num_done, written = json.loads(self._note.read_text())
            size = self._path.stat().st_size
        except (OSError, ValueError, TypeError):
            return 0, 0
        if self._key is None or key != self._key or size < len(self._header) + written:
            return 0, 0
        return int(num_done), int(written)

    def _size(self, index: int) -> int:
        return _size(self._entries[index]) if index < len(self._entries) else 0


def write_tensors(
    path: Path,
    entries: Sequence[StoredTensor],
    parts: Iterable[Tensor],
    advance: Callable[[int], None],
) -> None:
    """All of a file at once. `parts`: as `TensorWriter.write` takes them, one after another."""
    with TensorWriter(path, entries, advance) as writer:
        for part in parts:
            writer.write(part)


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
