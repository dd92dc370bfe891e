"""The paths of a token, and the points of one: start it, measure it idle, alone and under load.

Every path is a process tree of its own with the same engine, API and client; only what lies between
them differs. Knows no Ray: a path is a command.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchweave_ray.bench.load.serving import ServingConfig, run_benchmark
from torchweave_ray.bench.load.targets import openai_target, run_in_loop
from torchweave_ray.bench.load.workloads import Workload
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.report.points import Point
from torchweave_ray.bench.server_process import RunningServer, application_file, started_server

IDLE_S = 3.0
LONE_REQUESTS = 16
LONE_OUTPUT_LEN = 16
PROMPT_WORDS = 20
"""Some 100 tokens of one byte."""
NO_HAPROXY = ("--no-haproxy",)
ECHO_SERVER = (sys.executable, "-m", "torchweave_ray.bench.transport.echo_server")


@dataclass(frozen=True, slots=True)
class Route:
    """How tokens get from the engine to the client."""

    args: Mapping[str, Any] | None
    """Of deployments.bench.echo_app; None: one process, without Ray."""
    options: tuple[str, ...] = ()
    """Of `torchweave serve`."""


ROUTES: Mapping[str, Route] = {
    "process": Route(None),
    "default": Route({"default_path": True, "bus": False}, NO_HAPROXY),
    "default+bus": Route({"default_path": True, "bus": True}, NO_HAPROXY),
    "one-loop": Route({"bus": False}, NO_HAPROXY),
    "one-loop+bus": Route({"bus": True}, NO_HAPROXY),
    "haproxy": Route({"bus": False}),
    "haproxy+bus": Route({"bus": True}),
}
"""process: no Ray. default: Serve as it comes. one-loop: one event loop and gRPC, as our app sets
them. haproxy: the same behind HAProxy."""


@dataclass(frozen=True, slots=True)
class TransportConfig:
    concurrency: tuple[int, ...] = (1, 32)
    step_ms: float = 25.0
    output_len: int = 128
    rounds: int = 2
    """Requests a client under load."""
    seed: int = 0

    def requests(self, concurrency: int) -> tuple[int, int]:
        """(how many, tokens each): a client alone asks for little, for it is about TTFT."""
        if concurrency == 1:
            return LONE_REQUESTS, LONE_OUTPUT_LEN
        return self.rounds * concurrency, self.output_len


@dataclass(frozen=True, slots=True)
class TransportPoint:
    route: str
    concurrency: int
    failed: int
    errors: tuple[str, ...]
    tok_s: float
    texts_s: float
    """Messages of text a second that reached clients."""
    cpu_ms_per_token: float
    """Of all processes of the route together, what they take when idle included."""
    idle_cores: float
    """CPU seconds a second before the first request."""
    ttft_ms: float
    """p50."""
    added_ttft_ms: float
    """Beyond the one step that the engine takes."""
    itl_p99_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Rounded for reading."""
        return {k: _rounded(v) for k, v in asdict(self).items() if v != ()}


def measure(name: str, config: TransportConfig) -> Iterator[TransportPoint]:
    """One point a concurrency. Raises ServerFailed or BenchmarkError."""
    with _running(ROUTES[name], config.step_ms) as server:
        idle_cores = _idle_cores(server.pid)
        for concurrency in config.concurrency:
            requests, output_len = config.requests(concurrency)
            load = ServingConfig(
                concurrency=(concurrency,),
                requests=requests,
                workload=Workload(input_len=PROMPT_WORDS, output_len=output_len),
                seed=config.seed + concurrency,
                cpu_of=(server.pid,),
            )
            (point,) = run_in_loop(_points(server.url, load))
            yield _summary(name, point, idle_cores, config.step_ms)


async def _points(url: str, load: ServingConfig) -> list[Point]:
    target = await openai_target(url, "completions", None)
    return [m.point for m in await run_benchmark([target], load, lambda point: None)]


@contextmanager
def _running(route: Route, step_ms: float) -> Iterator[RunningServer]:
    if route.args is None:
        program = (*ECHO_SERVER, "--step-ms", str(step_ms))
        with started_server((), program=program) as server:
            yield server
        return
    args = {**route.args, "step_ms": step_ms}
    with tempfile.TemporaryDirectory() as folder:
        file = application_file(Path(folder), args, "deployments.bench.echo_app:build")
        options = (str(file), "--no-dashboard", *route.options)
        with started_server(options) as server:
            yield server


def _idle_cores(pid: int) -> float:
    tree = ProcessTree([pid])
    before, started = tree.cpu_seconds(), time.perf_counter()
    time.sleep(IDLE_S)
    return (tree.cpu_seconds() - before) / (time.perf_counter() - started)


def _summary(name: str, point: Point, idle_cores: float, step_ms: float) -> TransportPoint:
    assert point.server_cpu_ms_per_token is not None, "its process was named"
    assert point.concurrency is not None
    ttft = point.ttft_ms.p50 if point.ttft_ms else 0.0
    return TransportPoint(
        route=name,
        concurrency=point.concurrency,
        failed=point.failed,
        errors=point.errors,
        tok_s=point.output_tok_s,
        texts_s=point.texts_s,
        cpu_ms_per_token=point.server_cpu_ms_per_token,
        idle_cores=idle_cores,
        ttft_ms=ttft,
        added_ttft_ms=ttft - step_ms,
        itl_p99_ms=point.itl_ms.p99 if point.itl_ms else 0.0,
    )


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
