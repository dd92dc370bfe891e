"""A bounded file of KV blocks by hash that outlives its process; one process has it at a time.

Each slot carries its block's hash and a checksum of all of it: what a crash, a full disk or a bad
sector made of a block is never given back. Knows bytes only, and is used by one thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchweave_ray.errors import ConfigError

SUFFIX = ".kvspill"
_MAGIC = b"torchweave kv 1\n"
_FILE_HEADER = struct.Struct("<16s32sQ")
"""Magic, key, bytes of a block."""
_SLOT_HEADER = struct.Struct("<16s16sQI")
"""Hash, checksum, serial, and the CRC of these three."""
_FIRST_SLOT = 4096
_ALIGN = 64


class BlockFile:
    """`hash in file` may be asked from any thread."""

    def __init__(self, folder: Path, key: bytes, block_bytes: int, max_bytes: int) -> None:
        """Goes on with a file in `folder` that has this 32-byte `key` and that no live process has,
        or begins one. Files of other keys that nobody has are deleted.

        Raises ConfigError where the folder cannot be written, or `max_bytes` hold no block.
        """
        self._block_bytes = block_bytes
        self._slot_bytes = -(-(_ALIGN + block_bytes) // _ALIGN) * _ALIGN
        self.capacity = (max_bytes - _FIRST_SLOT) // self._slot_bytes
        """Most blocks that it holds."""
        if self.capacity < 1:
            raise ConfigError(
                f"cache.spill.max_bytes {max_bytes} holds no KV block of this model: one takes "
                f"{self._slot_bytes} bytes beside {_FIRST_SLOT}"
            )
        self.num_damaged = 0
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        """By hash, the least recently used first."""
        self._free: list[int] = []
        self._num_slots = 0
        self._serial = 0
        header = _FILE_HEADER.pack(_MAGIC, key, block_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = _adopt(folder, header)
            self._fd = _create(folder, header) if fd is None else fd
            self._read_index()
        except OSError as error:
            raise ConfigError(f"cache.spill.path {folder} cannot be used: {error}") from error

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def read(self, block_hash: bytes) -> memoryview | None:
        """The block, if it is there and whole."""
        slot = self._slots.get(block_hash)
        if slot is None:
            return None
        data = bytearray(self._slot_bytes)
        with suppress(OSError):  # a bad sector: what is missing spoils the checksum
            os.preadv(self._fd, [data], self._offset(slot))
        block = memoryview(data)[_ALIGN : _ALIGN + self._block_bytes]
        header = _parsed(data)
        if header is None or header[0] != block_hash or header[1] != _checksum(block_hash, block):
            self.num_damaged += 1
            del self._slots[block_hash]
            self._free.append(slot)
            return None
        self._slots.move_to_end(block_hash)
        return block

    def write(self, block_hash: bytes, block: memoryview) -> None:
        """In place of the least recently used block where the file is full. Raises OSError."""
        assert len(block) == self._block_bytes
        if block_hash in self._slots:
            return
        slot = self._take_slot()
        self._serial += 1
        parts = (block_hash, _checksum(block_hash, block), self._serial)
        header = _SLOT_HEADER.pack(*parts, _crc(*parts)).ljust(_ALIGN, b"\0")
        padding = bytes(self._slot_bytes - _ALIGN - len(block))
        try:
            num_written = os.pwritev(self._fd, [header, block, padding], self._offset(slot))
        except OSError:
            self._free.append(slot)
            raise
        if num_written < self._slot_bytes:
            self._free.append(slot)
            raise OSError(f"{num_written} bytes of {self._slot_bytes} written: is the disk full?")
        self._slots[block_hash] = slot

    def close(self) -> None:
        """Others may have the file from now on."""
        os.close(self._fd)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if self._num_slots < self.capacity:
            self._num_slots += 1
            return self._num_slots - 1
        return self._slots.popitem(last=False)[1]

    def _offset(self, slot: int) -> int:
        return _FIRST_SLOT + slot * self._slot_bytes

    def _read_index(self) -> None:
        """Cuts off what is beyond `capacity`, and half a slot at the end."""
        size = os.fstat(self._fd).st_size
        self._num_slots = max(0, min((size - _FIRST_SLOT) // self._slot_bytes, self.capacity))
        os.ftruncate(self._fd, self._offset(self._num_slots))
        found: list[tuple[int, bytes, int]] = []
        for slot in range(self._num_slots):
            header = _parsed(os.pread(self._fd, _ALIGN, self._offset(slot)))
            if header is None:
                self._free.append(slot)
            else:
                found.append((header[2], header[0], slot))
        for serial, block_hash, slot in sorted(found):
            if block_hash in self._slots:
                self._free.append(self._slots.pop(block_hash))
            self._slots[block_hash] = slot
            self._serial = serial


def _adopt(folder: Path, header: bytes) -> int | None:
    """The descriptor of a file that goes on, locked. Deletes what is of no use any more."""
    found: int | None = None
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with _locked(path, os.O_RDWR) as fd:
            if fd is None:
                continue
            if os.pread(fd, len(header), 0) != header:
                path.unlink(missing_ok=True)
            elif found is None:
                found = os.dup(fd)  # shares the lock, and keeps it
    return found


def _create(folder: Path, header: bytes) -> int:
    while True:
        path = folder / f"{secrets.token_hex(8)}{SUFFIX}"
        with _locked(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
            if fd is not None:
                os.pwrite(fd, header.ljust(_FIRST_SLOT, b"\0"), 0)
                return os.dup(fd)


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[int | None]:
    """None: another process has it, or has just deleted it."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)  # what people asked is in there
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield fd if os.fstat(fd).st_nlink else None
    finally:
        os.close(fd)


def _parsed(slot: bytes | bytearray) -> tuple[bytes, bytes, int] | None:
    """Hash, checksum and serial; None: the header is not whole."""
    if len(slot) < _SLOT_HEADER.size:
        return None
    block_hash, checksum, serial, crc = _SLOT_HEADER.unpack_from(slot)
    return (block_hash, checksum, serial) if crc == _crc(block_hash, checksum, serial) else None


def _crc(block_hash: bytes, checksum: bytes, serial: int) -> int:
    return zlib.crc32(struct.pack("<16s16sQ", block_hash, checksum, serial))


def _checksum(block_hash: bytes, block: memoryview) -> bytes:
    digest = hashlib.sha256(block_hash)  # CPUs have instructions for it
    digest.update(block)
    return digest.digest()[:16]
