"""The prefix cache's second place: blocks on a disk, read back when a prompt asks for them.

A prompt that the disk has more of than the cache waits in the queue while a thread reads; then the
blocks are cached as if just released. An idle engine has its cache saved. Knows hashes and blocks,
not what is in them or where the disk is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol

from torchweave_ray.block_hash import BlockHash
from torchweave_ray.engine.block_manager import BlockManager
from torchweave_ray.engine.sequence import Sequence

_PORTION_BYTES = 8 << 20
"""Copied at a time from an idle engine's cache."""
_BATCH_BYTES = 32 << 20
"""Read at a time for a prompt."""
_PATIENCE_S = 2.0
"""A disk that takes longer is not waited for: the prompt is computed."""
_WAIT_S = 0.02
_CLOSING_S = 5.0
"""For what is not saved yet when the engine closes."""


class BlockStore(Protocol):
    @property
    def capacity(self) -> int:
        """Most blocks that it keeps."""
        ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def num_damaged(self) -> int: ...

    def __contains__(self, block_hash: object) -> bool: ...

    def read(self, block_hashes: Several[BlockHash]) -> Future[list[memoryview | None]]:
        """In a thread; None for those that are not there or not whole."""
        ...

    def put(self, block: int, content: memoryview) -> None:
        """Into a block that nobody uses. Between steps."""
        ...

    def save(self, blocks: Several[tuple[BlockHash, int]]) -> Future[int]:
        """Copy them now, between steps, and write them in a thread; how many it could."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Reading:
    seq: Sequence
    sought: list[BlockHash]
    """Of all blocks that the sequence may then begin with."""
    hashes: list[BlockHash]
    """Of those that are read."""
    contents: Future[list[memoryview | None]]
    since: float


class Spill:
    """Called where the engine steps."""

    def __init__(
        self,
        store: BlockStore | None,
        blocks: BlockManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`store`: None: there is none."""
        self._store = store
        self._blocks = blocks
        self._clock = clock
        self._readings: dict[int, _Reading] = {}
        """By seq_id."""
        self._late: list[_Reading] = []
        """Nobody waits for them any more."""
        self._saving: Future[int] | None = None
        self._num_saving = 0
        self._saved_until = 0
        """`BlockManager.num_published` when all that was cached had been saved."""
        self.num_restored_tokens = 0
        self.num_saved_blocks = 0

    @property
    def num_damaged_blocks(self) -> int:
        return 0 if self._store is None else self._store.num_damaged

    def admit(self, seq: Sequence) -> bool:
        """Whether a waiting sequence may run now, as far as the disk goes."""
        if self._store is None:
            return True
        reading = self._readings.get(seq.seq_id)
        if reading is None:
            return not self._begin_reading(seq, self._store)
        if self._clock() - reading.since < _PATIENCE_S:
            return False
        self._late.append(self._readings.pop(seq.seq_id))
        return True

    def begin_step(self) -> None:
        """Cache what has been read since the last one."""
        for seq_id, reading in list(self._readings.items()):
            if reading.contents.done():
                self._adopt(self._readings.pop(seq_id))
        for reading in [each for each in self._late if each.contents.done()]:
            self._late.remove(reading)
            self._adopt(reading)

    def wait(self) -> None:
        """For a moment, if something is being read: there is nothing else to do."""
        wait([each.contents for each in self._readings.values()], _WAIT_S)

    def save(self) -> bool:
        """A portion of what is cached and not on the disk yet; whether there may be more. Called
        while the engine is idle, now and then."""
        if self._store is None or self._blocks.num_published == self._saved_until:
            return False
        if self._saving is not None:
            if not self._saving.done():
                return True
            num_saved = self._saving.result()
            self.num_saved_blocks += num_saved
            self._saving = None
            if num_saved < self._num_saving:  # not again before there is something new
                self._saved_until = self._blocks.num_published
                return False
        portion = self._unsaved(self._store)
        if not portion:
            self._saved_until = self._blocks.num_published
            return False
        self._num_saving = len(portion)
        self._saving = self._store.save(portion)
        return True

    def flush(self, timeout_s: float) -> None:
        """Save all that is cached, if it can be done in time."""
        end = self._clock() + timeout_s
        while self._clock() < end and self.save():
            if self._saving is not None:
                wait([self._saving], max(0.0, end - self._clock()))

    def close(self) -> None:
        """Closing twice does nothing."""
        if self._store is not None:
            self.flush(_CLOSING_S)
            self._store.close()
            self._store = None

    def _unsaved(self, store: BlockStore) -> list[tuple[BlockHash, int]]:
        """The last used first; as many as are copied in a few milliseconds."""
        most = max(1, _PORTION_BYTES // store.block_bytes)
        portion: list[tuple[BlockHash, int]] = []
        for block_hash, block in self._blocks.cached(store.capacity):
            if block_hash not in store:
                portion.append((block_hash, block))
                if len(portion) == most:
                    break
        return portion

    def _begin_reading(self, seq: Sequence, store: BlockStore) -> bool:
        """False: the store has nothing that the cache lacks, or does not answer."""
        if self._late:
            return False
        sought = self._blocks.sought(seq, store.__contains__)
        wanted = self._missing(seq, sought, store)
        if not wanted:
            return False
        if not any(wanted[0] in reading.hashes for reading in self._readings.values()):
            contents, now = store.read(wanted), self._clock()
            self._readings[seq.seq_id] = _Reading(seq, sought, wanted, contents, now)
            seq.num_sought_blocks += len(wanted)
        return True

    def _missing(
        self, seq: Sequence, sought: list[BlockHash], store: BlockStore
    ) -> list[BlockHash]:
        """What the cache lacks of the longest start of a sequence, a batch at most."""
        missing = [each for each in sought if not self._blocks.is_cached(each)]
        num_cached = len(sought) - len(missing)
        if num_cached < seq.num_sought_blocks:
            return []  # it was sought, and lost
        seq.num_sought_blocks = num_cached
        most = max(1, _BATCH_BYTES // store.block_bytes)
        return missing[: min(most, self._blocks.num_spare_blocks)]

    def _adopt(self, reading: _Reading) -> None:
        store = self._store
        assert store is not None
        whole = list(_until_none(reading.contents.result()))
        num_had = self._blocks.num_shared_tokens(reading.seq)
        found = self._blocks.adopt(reading.hashes[: len(whole)], reading.sought)
        for block, content in zip(found, whole, strict=False):
            store.put(block, content)
        num_has = self._blocks.num_shared_tokens(reading.seq)
        self.num_restored_tokens += max(0, num_has - num_had)


def _until_none(contents: Iterable[memoryview | None]) -> Iterable[memoryview]:
    for content in contents:
        if content is None:
            return
        yield content
