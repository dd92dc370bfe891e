"""The usage log: a folder of JSON lines that is only ever appended to.

Each process writes a file of its own, and begins another when one is full. A line is with the
kernel as soon as it is written, so that not even SIGKILL takes it, and on the disk soon after.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchweave_ray.errors import ConfigError

logger = logging.getLogger(__name__)

COMPLAIN_S = 60.0


class UsageLog:
    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises ConfigError when nothing can be written there."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._complained_at = float("-inf")
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise ConfigError(f"usage_log {folder} cannot be written: {error}") from error

    def write(self, line: dict[str, Any]) -> None:
        """A full disk loses lines, which the log says, and no request."""
        data = (json.dumps(line, separators=(",", ":")) + "\n").encode()
        with self._lock:
            try:
                if self._num_bytes and self._num_bytes + len(data) > self._max_bytes:
                    os.fsync(self._file)
                    os.close(self._file)
                    self._file = self._open()
                self._num_bytes += os.write(self._file, data)
            except OSError as error:
                self._complain(error)

    def sync(self) -> None:
        """Any thread may call."""
        with self._lock:
            try:
                os.fsync(self._file)
            except OSError as error:
                self._complain(error)

    def close(self) -> None:
        self.sync()
        os.close(self._file)

    def _open(self) -> int:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        name = f"usage-{now}-{secrets.token_hex(4)}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._num_bytes = 0
        return os.open(self._folder / name, flags, 0o640)

    def _complain(self, error: OSError) -> None:
        if time.monotonic() - self._complained_at > COMPLAIN_S:
            self._complained_at = time.monotonic()
            logger.error("[Usage] lines are lost: %s", error)
