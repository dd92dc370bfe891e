"""A server as a process of our own: start it, wait for its first 200, stop it.

Knows no Ray and no model: any command that listens on the port will do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchweave_ray.errors import TorchWeaveError

READY_PATH = "/readyz"
MODEL_VARIABLES = ("HF_MODEL", "ARTIFACT_MODEL_DIR")
PR_SET_PDEATHSIG = 1
POLL_S = 0.05
STOP_WITHIN_S = 60.0


class ServerFailed(TorchWeaveError):
    """The server ended, or never answered; carries the end of what it said."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    url: str
    pid: int
    ready_s: float
    """From the start of the process to the first 200 of READY_PATH."""
    log: Path | None = None

    def says(self, text: str, within_s: float) -> str:
        """What it has said, when that holds `text` or the time is over."""
        deadline = time.perf_counter() + within_s
        while True:
            said = self.log.read_text(errors="replace") if self.log else ""
            if text in said or not self.log or time.perf_counter() > deadline:
                return said
            time.sleep(POLL_S)


@contextmanager
def started_server(
    arguments: Sequence[str], within_s: float = 300.0, program: Sequence[str] | None = None
) -> Iterator[RunningServer]:
    """`torchweave serve` with these arguments (or another program) on a free port of its own.

    The arguments alone say which model: environment variables that would say otherwise are unset.

    Raises ServerFailed. It is stopped by SIGTERM, so that it ends its streams and its children.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    own = (sys.executable, "-m", "torchweave_ray.cli", "serve", "--host", "127.0.0.1")
    command = [*(program or own), "--port", str(port), *arguments]
    with tempfile.TemporaryDirectory(prefix="torchweave-bench-") as folder:
        log = Path(folder) / "server.log"
        started = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={k: v for k, v in os.environ.items() if k not in MODEL_VARIABLES},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        try:
            _wait_until_ready(url, process, log, started + within_s)
            yield RunningServer(url, process.pid, time.perf_counter() - started, log)
        finally:
            _stop(process)


def application_file(
    folder: Path, args: Mapping[str, Any], import_path: str = "deployments.app:build"
) -> Path:
    """What `torchweave serve` is given of an application."""
    application = {"name": "torchweave", "route_prefix": "/", "import_path": import_path}
    file = folder / "serve_config.yaml"
    given = {"args": args} if args else {}
    file.write_text(yaml.safe_dump({"applications": [{**application, **given}]}))
    return file


def _end_with_parent() -> None:
    """SIGTERM when the benchmark is gone, however it went: no server outlives it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(
    url: str, process: subprocess.Popen[bytes], log: Path, deadline: float
) -> None:
    while True:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with status {process.returncode}:\n{_end(log)}")
        try:
            with urllib.request.urlopen(url + READY_PATH, timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.perf_counter() > deadline:
                raise ServerFailed(f"the server is not ready: {error}\n{_end(log)}") from error
        time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
