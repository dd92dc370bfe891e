"""The keys that hold now: read again whenever their file has changed.

Looked at once a second, by the request that comes then, so that an idle server does nothing. A file
that has become unreadable leaves the keys as they were, and says so in the log.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from torchweave_ray.api.access.key_file import ApiKey, digest_of, read_keys
from torchweave_ray.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
_NOBODY = "0" * 64


class Keyring:
    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError when the file cannot be used."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._state = _state_of(path)
        self._by_digest = _by_digest(read_keys(path))
        self._reading = asyncio.Lock()

    async def find(self, presented: str) -> ApiKey | None:
        """The key's entry, expired or not; None: there is none.

        Takes as long for a wrong key as for a right one: what is looked up is a digest, of which a
        caller can choose no part, and what is found is compared in constant time.
        """
        await self._look()
        digest = digest_of(presented)
        found = self._by_digest.get(digest)
        is_right = hmac.compare_digest(_NOBODY if found is None else found.sha256, digest)
        return found if is_right else None

    async def _look(self) -> None:
        if self._clock() - self._looked_at < LOOK_S or self._reading.locked():
            return
        self._looked_at = self._clock()
        state = _state_of(self._path)
        if state == self._state:
            return
        async with self._reading:
            try:
                keys = await asyncio.to_thread(read_keys, self._path)
            except ConfigError as error:
                logger.error("[Keys] the old keys stay: %s", error)
            else:
                self._by_digest = _by_digest(keys)
                logger.info("[Keys] %d keys read from %s", len(keys), self._path)
            self._state = state


def _by_digest(keys: tuple[ApiKey, ...]) -> dict[str, ApiKey]:
    return {key.sha256: key for key in keys}


def _state_of(path: Path) -> tuple[int, int, int] | None:
    """Of what a link leads to: a mounted secret is replaced by turning one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
