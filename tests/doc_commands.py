"""Runs the documentation's blocks as a reader would, and the server that some of them talk to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
READY_WITHIN_S = 240.0


def run_block(
    language: str, code: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """In the checkout, with this environment's commands first on the path."""
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


@contextmanager
def serving(log_file: Path, store: Path) -> Iterator[str]:
    """`torchweave serve` on a free port, over the artifacts of `store`."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    environment = _environment({"ARTIFACT_DIR": str(store)})
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [str(BIN / "torchweave"), "serve", "--port", str(port), "--no-dashboard"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(url, process, log_file)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"not ready in {READY_WITHIN_S:g} s\n{log.read_text()[-4000:]}")


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **more}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
