"""A file that arrives in chunks, in any order, and is hashed meanwhile: a kill loses no chunk.

    <name>.part       the bytes, each chunk at its place
    <name>.part.log   what file of which version it is, then a line a chunk: number and CRC-32
    <name>.whole      version and sha256 of the whole file, written before it gets its name

Knows nothing of where the chunks come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from pathlib import Path

from optimizer.sources.remote_files import RemoteFile
from optimizer.store import sync_path, write_atomically


class PartialFile:
    chunk_size = 8 << 20

    def __init__(self, folder: Path, file: RemoteFile) -> None:
        """Takes over what an earlier run left of this very version; another's is thrown away."""
        self.file = file
        self.path = folder / file.name
        self._part = folder / f"{file.name}.part"
        self._log_path = folder / f"{file.name}.part.log"
        self._whole = folder / f"{file.name}.whole"
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._done: set[int] = set()
        self._hashed = 0
        """Chunks from the start on that are in the digest."""
        self.sha256 = self._read_whole()
        self._data = self._log = -1
        if self.sha256 is None:
            self._open()

    @property
    def num_bytes(self) -> int:
        """How many are here already, as far as the size is known."""
        if self.sha256 is not None:
            return self.path.stat().st_size
        return sum(end - start for start, end in map(self._span, self._done))

    def missing(self) -> list[tuple[int, int, int]]:
        """Number, start and end of each chunk that is not here. Only for a file of known size."""
        assert self.file.size is not None
        count = 0 if self.sha256 is not None else -(-self.file.size // self.chunk_size)
        return [(i, *self._span(i)) for i in range(count) if i not in self._done]

    def add(self, index: int, data: bytes) -> None:
        """Chunks may come from several threads, in any order. Raises OSError (a full disk)."""
        with self._lock:
            _write_at(self._data, data, index * self.chunk_size)
            _write_at(self._log, f"{index} {zlib.crc32(data)}\n".encode(), None)
            self._done.add(index)
            while self._hashed in self._done:
                self._digest.update(data if self._hashed == index else self._read(self._hashed))
                self._hashed += 1

    def restart(self) -> None:
        """Forget everything: of a stream that cannot be continued."""
        self._done, self._hashed, self._digest = set(), 0, hashlib.sha256()
        os.ftruncate(self._data, 0)
        os.ftruncate(self._log, 0)
        _write_at(self._log, (self._header() + "\n").encode(), None)

    def finish(self) -> None:
        """All chunks were added: the file gets its name."""
        if self.sha256 is not None:
            return
        os.fsync(self._data)
        self.sha256 = self._digest.hexdigest()
        values = {"header": self._header(), "sha256": self.sha256}
        write_atomically(self._whole, json.dumps(values))
        self._part.replace(self.path)
        sync_path(self.path.parent)
        self.close()
        self._log_path.unlink(missing_ok=True)

    def close(self) -> None:
        for descriptor in (self._data, self._log):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._log = -1

    def _open(self) -> None:
        logged = self._read_log()
        self._data = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
        self._log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if logged is None:
            self.restart()
            return
        for index in sorted(logged):
            data = self._read(index)
            if zlib.crc32(data) == logged[index]:
                self._done.add(index)
                if index == self._hashed:
                    self._digest.update(data)
                    self._hashed += 1

    def _read_log(self) -> dict[int, int] | None:
        """CRC-32 of each chunk by number; None: nothing of this version."""
        try:
            header, *lines = self._log_path.read_text().splitlines(keepends=True)
        except (OSError, ValueError):
            return None
        if self.file.size is None or header != self._header() + "\n":
            return None
        pairs = [line.split() for line in lines if line.endswith("\n")]  # the last may be cut
        last = -(-self.file.size // self.chunk_size)
        return {int(i): int(crc) for i, crc in pairs if int(i) < last}

    def _read_whole(self) -> str | None:
        try:
            values = json.loads(self._whole.read_text())
        except (OSError, ValueError):
            return None
        whole = values["header"] == self._header() and self.path.is_file()
        return str(values["sha256"]) if whole else None

    def _header(self) -> str:
        return json.dumps([self.file.size, self.file.version, self.chunk_size])

    def _span(self, index: int) -> tuple[int, int]:
        size = self.file.size
        end = (index + 1) * self.chunk_size
        return index * self.chunk_size, end if size is None else min(end, size)

    def _read(self, index: int) -> bytes:
        start, end = self._span(index)
        return os.pread(self._data, end - start, start)


def _write_at(descriptor: int, data: bytes, offset: int | None) -> None:
    """All of it, at `offset` or at the end of a file opened for appending."""
    view = memoryview(data)
    while view:
        if offset is None:
            count = os.write(descriptor, view)
        else:
            count = os.pwrite(descriptor, view, offset)
            offset += count
        view = view[count:]
