"""How staging tells what it does: a protocol, and the three ways of showing it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_LOG = logging.getLogger("torchweave.optimizer")
LOG_INTERVAL_S = 10.0


class Progress(Protocol):
    def start(self, stage: str) -> None: ...

    def expect(self, num_bytes: int) -> None:
        """The bytes that the running stage will advance by, once it knows."""
        ...

    def advance(self, num_bytes: int) -> None: ...

    def finish(self, stage: str, seconds: float, resumed: bool) -> None:
        """`resumed`: an earlier run had done it, in so many seconds."""
        ...

    def wait(self, recipe: str) -> None:
        """Another process stages the same recipe; this one waits for it."""
        ...


class SilentProgress:
    def start(self, stage: str) -> None: ...

    def expect(self, num_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def finish(self, stage: str, seconds: float, resumed: bool) -> None: ...

    def wait(self, recipe: str) -> None: ...


class LogProgress:
    """Lines of a log, for workers that nobody watches: a stage's start and end, and how far it is
    every few seconds."""

    def __init__(self, interval_s: float = LOG_INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._stage = ""
        self._num_bytes = self._expected = 0
        self._started_at = self._said_at = time.monotonic()

    def start(self, stage: str) -> None:
        self._stage = stage
        self._num_bytes = self._expected = 0
        self._started_at = self._said_at = time.monotonic()
        _LOG.info("[Optimizer] %s ...", stage)

    def expect(self, num_bytes: int) -> None:
        self._expected = self._num_bytes + num_bytes

    def advance(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        now = time.monotonic()
        if now - self._said_at < self._interval_s:
            return
        self._said_at = now
        speed = self._num_bytes / max(now - self._started_at, 1e-9)
        _LOG.info(
            "[Optimizer] %s %.1f%s MB, %.1f MB/s",
            *(self._stage, self._num_bytes / 1e6),
            f" of {self._expected / 1e6:.1f}" if self._expected else "",
            speed / 1e6,
        )

    def finish(self, stage: str, seconds: float, resumed: bool) -> None:
        if resumed:
            _LOG.info("[Optimizer] %s was done by an earlier run", stage)
        else:
            _LOG.info("[Optimizer] %s %.1f s, %.1f MB", stage, seconds, self._num_bytes / 1e6)

    def wait(self, recipe: str) -> None:
        _LOG.info("[Optimizer] waiting for another process that stages %s", recipe)


class BarProgress:
    """A bar a stage, by rich, on stderr: stdout is for results. Use as a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        self._bars: Bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, stage: str) -> None:
        self._task = self._bars.add_task(stage, total=None)

    def expect(self, num_bytes: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)

    def finish(self, stage: str, seconds: float, resumed: bool) -> None:
        if resumed:
            self._bars.console.print(f"{stage:<8} done by an earlier run")
        elif self._task is not None:
            done = self._bars.tasks[self._task].completed
            self._bars.update(self._task, total=done or 1, completed=done or 1)
        self._task = None

    def wait(self, recipe: str) -> None:
        self._bars.console.print(f"waiting for another process that stages {recipe}")
