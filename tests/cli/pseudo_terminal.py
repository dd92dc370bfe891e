"""A command on a terminal of its own, typed at and read as a person would. No test."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")


class Terminal:
    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self.raw = ""
        """Everything that was written, escapes included."""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, within_s: float = 30.0) -> str:
        """What came since the last call, up to `text`, without escapes."""
        deadline = time.monotonic() + within_s
        while True:
            fresh = ESCAPES.sub("", self.raw)[self._seen :]
            before, found, _ = fresh.partition(text)
            if found:
                self._seen += len(before + found)
                return before + found
            assert time.monotonic() < deadline, f"no {text!r} in {fresh!r}"
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self.raw += os.read(self._master, 65536).decode("utf-8", "replace")
                except OSError as error:  # the command closed its terminal
                    raise AssertionError(f"no {text!r} in {fresh!r}") from error

    def press(self, key: str, text: str, times: int = 10) -> None:
        """A key, until `text` comes: readline misses a signal just before it begins to wait."""
        for _ in range(times - 1):
            self.type(key)
            with suppress(AssertionError):
                self.wait_for(text, 3)
                return
        self.type(key)
        self.wait_for(text)


def _take_terminal() -> None:
    """Ctrl-C reaches the command, also where the tests run in the background and ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """`torchweave` with these arguments, 80 columns wide."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        env.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "torchweave_ray.cli", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
