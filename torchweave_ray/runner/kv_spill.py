"""Blocks of a KV cache on their way to a file and back; the file is a thread's.

Implements engine.memory.spill.BlockStore. Knows which block has which hash only while it is told.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torchweave_ray.config import SpillConfig
from torchweave_ray.outputs import ModelInfo
from torchweave_ray.runner.block_file import BlockFile
from torchweave_ray.runner.kv_cache import KVCache

logger = logging.getLogger(__name__)

_FORMAT = 1


class KVSpill:
    def __init__(self, file: BlockFile, kv_cache: KVCache) -> None:
        self.capacity = file.capacity
        self.block_bytes = kv_cache.block_bytes
        self._file = file
        self._kv_cache = kv_cache
        self._thread = ThreadPoolExecutor(1, "kv-spill")
        self._failure: OSError | None = None

    @property
    def num_damaged(self) -> int:
        return self._file.num_damaged

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._file

    def read(self, block_hashes: Sequence[bytes]) -> Future[list[memoryview | None]]:
        return self._thread.submit(lambda: [self._file.read(each) for each in block_hashes])

    def put(self, block: int, content: memoryview) -> None:
        self._kv_cache.write_block(block, content)

    def save(self, blocks: Sequence[tuple[bytes, int]]) -> Future[int]:
        copies = [(each, self._kv_cache.read_block(block)) for each, block in blocks]
        return self._thread.submit(self._write, copies)

    def close(self) -> None:
        """Once what is being written is there."""
        self._thread.shutdown(cancel_futures=False)
        self._file.close()

    def _write(self, copies: Sequence[tuple[bytes, memoryview]]) -> int:
        for num, (block_hash, content) in enumerate(copies):
            try:
                self._file.write(block_hash, content)
            except OSError as error:
                if self._failure is None:
                    logger.warning("[Spill] KV blocks cannot be written: %s", error)
                self._failure = error
                return num
        self._failure = None
        return len(copies)


def open_spill(config: SpillConfig | None, info: ModelInfo, kv_cache: KVCache) -> KVSpill | None:
    """None: the configuration asks for none. Raises ConfigError for a folder of no use."""
    if config is None:
        return None
    parts = [_FORMAT, info.artifact_id, info.numerics_id, info.block_size, kv_cache.block_bytes]
    key = hashlib.sha256(json.dumps(parts).encode()).digest()
    folder = Path(config.path).expanduser()
    file = BlockFile(folder, key, kv_cache.block_bytes, config.max_bytes)
    logger.info("[Spill] %d KV blocks of %d at hand in %s", len(file), file.capacity, folder)
    return KVSpill(file, kv_cache)
