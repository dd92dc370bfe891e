"""Drains applications from outside: their ingresses refuse what is new, and end what is open.

Only then may anything be stopped: a replica that Serve stops would leave the calls of an
ingress, to which kept-alive connections go on bringing requests, without anybody to answer them.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError

logger = logging.getLogger(__name__)

POLL_S = 0.2
ANSWER_TIMEOUT_S = 10.0
NOBODY_S = 5.0
"""No ingress known for so long: there is none. A new handle learns of them in a moment."""
GOODBYE_S = 1.0
"""For connections that are kept alive to hear, with their next answer, that they are closed."""


def drain(apps: Sequence[str], timeout_s: float, say: Callable[[str], None]) -> None:
    """Returns when nothing is open in any ingress of `apps`, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    ingresses = [_Ingresses(app) for app in apps]
    heard_at, said = time.monotonic(), 0
    while time.monotonic() < deadline:
        answers = [each.drain() for each in ingresses]
        if None not in answers:
            heard_at = time.monotonic()
        num_open = sum(filter(None, answers))
        if not num_open and (None not in answers or time.monotonic() - heard_at > NOBODY_S):
            break
        if num_open != said:
            say(f"[Serve] {num_open} requests are open")
            said = num_open
        time.sleep(POLL_S)


class _Ingresses:
    """All ingress replicas of one application."""

    def __init__(self, app: str) -> None:
        self._handle = serve.get_app_handle(app)
        self._handle._init(_run_router_in_separate_loop=True)  # no loop runs here

    def drain(self) -> int | None:
        """Returns what is open; None: nobody answers. Asked again and again, as Serve may have
        replaced an ingress meanwhile."""
        try:
            answers = self._handle.broadcast("drain").results(
                timeout_s=ANSWER_TIMEOUT_S, return_exceptions=True
            )
        except (DeploymentUnavailableError, TimeoutError) as error:
            logger.info("[Drain] no ingress answers: %r", error)
            return None
        return sum(answer for answer in answers if isinstance(answer, int))


def close_haproxy() -> None:
    """Have the HAProxy of this run listen no more, and close the connections that it keeps with
    their next answer."""
    path = os.environ.get("RAY_SERVE_HAPROXY_SOCKET_PATH")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1" or not path:
        return
    # Serve puts a folder of the node's id between; there is one node.
    folder, name = os.path.split(path)
    found = [*Path(folder).glob(f"*/{name}"), Path(path)]
    _shut_frontend(str(found[0]))
    time.sleep(GOODBYE_S)


def _shut_frontend(path: str) -> None:
    try:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(2.0)
            admin.connect(path)
            admin.sendall(b"shutdown frontend http_frontend\n")
            answer = admin.recv(4096).strip()
    except OSError as error:
        logger.warning("[Drain] HAProxy at %s: %r", path, error)
        return
    if answer:
        logger.warning("[Drain] HAProxy: %s", answer.decode(errors="replace"))


def end_haproxy() -> None:
    """Of a Ray that is gone, its HAProxy goes too. It is known by its file, this run's own, or in
    a folder of the node's id beside that."""
    path = os.environ.get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", "")
    folder, name = os.path.split(os.fsencode(path))
    for process in Path("/proc").glob("[0-9]*") if path else ():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            ours = any(w.startswith(folder + b"/") and w.endswith(b"/" + name) for w in words)
            if ours and Path(os.fsdecode(words[0])).name.startswith("haproxy"):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # it has just ended
            continue
