"""`torchweave serve`: a Ray of its own on this machine, in the HAProxy profile, and the app on it.

Owns the process: the environment before Ray starts, signals, folders, the exit. What is deployed,
and how one waits for it, is deployments/launch.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from torchweave_ray.cli.completion import one_of, recipes
from torchweave_ray.errors import ConfigError

LONGEST_STREAM_S = 600
DEREGISTER_S = 1
"""How long a stopping ingress stays reachable, for HAProxy to learn that it goes."""
PORTS_OF_A_RUN = 100
Verify = Annotated[
    str | None,
    typer.Option(help="full: hash artifacts whole at every start.", autocompletion=one_of("full")),
]
PROFILE = {
    "RAY_worker_niceness": "0",  # Ray runs its workers at 15; ours answer people
    # A proxy that needs longer is killed, and Serve does not start: Ray's 5 s are too few for its
    # imports on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
_claims: list[socket.socket] = []
"""A port of each range that this process has given away."""


def serve(
    config: Annotated[
        Path | None,
        typer.Argument(help="A Serve configuration. Default: serve_config.yaml, if it is here."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Serve this model instead: whatever `torchweave optimize` takes.",
            autocompletion=recipes,
        ),
    ] = None,
    artifact: Annotated[
        str | None, typer.Option(help="Serve this staged artifact instead: a folder or a URL.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on. Default: 8000.", min=1, max=65535)
    ] = None,
    haproxy: Annotated[
        bool, typer.Option(help="HAProxy in front, in place of Ray's own Python proxy.")
    ] = True,
    dashboard: Annotated[bool, typer.Option(help="Start Ray's dashboard too.")] = True,
    verify: Verify = None,
) -> None:
    """Start Ray on this machine and serve a model over HTTP until SIGTERM or Ctrl-C.

    Then the streams that are open are finished first; a second signal ends them at once.
    """
    stop = StopSignal()
    folder = Path(tempfile.mkdtemp(prefix="torchweave-"))
    profile = PROFILE | (haproxy_profile(folder) if haproxy else {})
    for name, value in profile.items():
        os.environ.setdefault(name, value)
    if recipe or artifact:  # the command line goes over the environment
        for name in ("HF_MODEL", "ARTIFACT_MODEL_DIR"):
            os.environ.pop(name, None)
    try:
        # Only now: Ray Serve reads the environment when it is imported.
        from deployments.cpu_policy import let_models_finish
        from deployments.launch import Launch, load_config

        let_models_finish()
        plan = load_config(config, recipe, artifact, host, port, verify)
        Launch(plan, dashboard, typer.echo).run(stop.event, stop.install)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class StopSignal:
    """The first SIGTERM or SIGINT asks to stop; the second one ends the process, and with it Ray,
    whose processes die with their parent."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.install()

    def install(self) -> None:
        """Ray puts handlers of its own in place when it starts: call this again after that."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set():
            os._exit(128 + number)
        self.event.set()


def haproxy_profile(folder: Path) -> dict[str, str]:
    """Environment of Ray's processes: HAProxy and one loop for everything. Ports and files are
    this run's own, so that two can run on one host."""
    first = _claim_range()
    http, grpc = first + 1, first + PORTS_OF_A_RUN // 2
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(grpc - 1),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(grpc - 2),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http),
        # Serve's own proxy stands behind HAProxy. On a fixed port it would share that with another
        # server of this user, each answering for the other, and fail beside another user's.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(grpc - 3),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc - 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(grpc - 5),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + PORTS_OF_A_RUN - 1),
        # A reload must not cut the streams of the HAProxy process that it replaces.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTER_S),
    }


def _claim_range() -> int:
    """The first of PORTS_OF_A_RUN free ports, above Ray's own and below the ephemeral ones. It is
    held as long as this process lives: the others are taken seconds later, by other processes."""
    for _ in range(50):
        first = random.randrange(20_000, 32_000, PORTS_OF_A_RUN)
        claim = _bound(first)
        if claim is None:
            continue
        if all(map(_is_free, range(first + 1, first + PORTS_OF_A_RUN))):
            _claims.append(claim)
            return first
        claim.close()
    raise ConfigError("no free range of ports between 20000 and 32000")


def _is_free(port: int) -> bool:
    if (probe := _bound(port)) is None:
        return False
    probe.close()
    return True


def _bound(port: int) -> socket.socket | None:
    """None: somebody has it."""
    probe = socket.socket()
    try:
        probe.bind(("", port))
    except OSError:
        probe.close()
        return None
    return probe
