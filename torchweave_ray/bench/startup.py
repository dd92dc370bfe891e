"""How long a start takes and what a replica weighs, on an artifact that is staged.

Starts real processes: the engine alone, and `torchweave serve` with the model, with an empty
application and with two replicas. Nothing is dropped from the page cache before.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchweave_ray.bench.load.serving import ServingConfig, run_benchmark
from torchweave_ray.bench.load.targets import BenchmarkError, openai_target, run_in_loop
from torchweave_ray.bench.load.workloads import Workload
from torchweave_ray.bench.process_tree import ProcessTree, memory_of
from torchweave_ray.bench.server_process import RunningServer, application_file, started_server

PROFILES: Mapping[str, tuple[str, ...]] = {"default": ("--no-haproxy",), "haproxy": ()}
"""Options of `torchweave serve`: Ray Serve's own proxy, and HAProxy."""
APPS = ("empty", "model")
KV_MEMORY = 32 << 20
"""Of a replica that is weighed: its memory beyond the KV cache is between USS - this and USS."""
NUM_REPLICAS = 2
PARTS_WITHIN_S = 10.0

Line = dict[str, Any]


def first_token(artifact: Path, options: Mapping[str, Any], run: int) -> Line:
    """Seconds from the start of a process to the first token of a 100-token prompt, by parts.

    `options`: as of `LLM`. Raises BenchmarkError with what the process said.
    """
    command = [sys.executable, "-m", "torchweave_ray.bench.first_token", str(artifact)]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, json.dumps(dict(options))], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        answer = process.stdout.readline()
        total = time.perf_counter() - started
        said = process.communicate()[1].decode(errors="replace")
    if process.returncode or not answer:
        raise BenchmarkError(f"no first token: {said[-2000:]}")
    parts = json.loads(answer)
    parts = {"interpreter": total - sum(parts.values()), **parts}
    return {"measure": "first_token", "run": run, "seconds": round(total, 3), "parts": _all(parts)}


def ready(model: str, profile: str, app: str, run: int) -> Line:
    """Seconds from the start of `torchweave serve` to its first 200 of /readyz, and by its own log
    those of its parts and of the model's."""
    with tempfile.TemporaryDirectory() as folder:
        empty = application_file(Path(folder), {}, "deployments.bench.empty_app:app")
        chosen = serve_options(model) if app == "model" else (str(empty),)
        with started_server((*chosen, "--no-dashboard", *PROFILES[profile])) as server:
            line = {"measure": "ready", "profile": profile, "app": app, "run": run}
            return {**line, "seconds": round(server.ready_s, 3), "parts": _parts(server)}


def replica_memory(model: str, staging: str = "files") -> Line:
    """Memory of two replicas on this node after a little work: their own (USS), their share of what
    they have in common (PSS), and all that they map (RSS)."""
    key = serve_options(model)[0].removeprefix("--")
    replicas = {
        key: model,
        "id": "weighed",
        "num_replicas": NUM_REPLICAS,
        "engine": {"cache": {"kv_memory": KV_MEMORY}},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = application_file(Path(folder), {"models": [replicas], "staging": staging})
        with started_server((str(file), "--no-dashboard")) as server:
            run_in_loop(_little_work(server.url))
            pids = ProcessTree([server.pid]).named("ServeReplica", "ModelReplica")
            weighed = [memory_of(pid) for pid in pids]
    if len(weighed) != NUM_REPLICAS:
        raise BenchmarkError(f"{len(weighed)} replicas found, {NUM_REPLICAS} were asked for")
    mib = {
        f"{kind}_mib": [round(getattr(each, kind) / 2**20, 1) for each in weighed]
        for kind in ("uss", "pss", "rss")
    }
    return {"measure": "memory", "staging": staging, **mib, "kv_memory_mib": KV_MEMORY / 2**20}


def serve_options(model: str) -> tuple[str, ...]:
    """How `torchweave serve` is told of a model: a staged artifact's folder, or a recipe."""
    is_artifact = (Path(model) / "manifest.json").is_file()
    return ("--artifact" if is_artifact else "--recipe", model)


def medians(lines: Sequence[Line]) -> dict[str, float]:
    """Seconds by what was measured, over its runs."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if "seconds" in line:
            name = " ".join(line[k] for k in ("measure", "profile", "app") if k in line)
            found.setdefault(name, []).append(line["seconds"])
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


async def _little_work(url: str) -> None:
    target = await openai_target(url, "completions", None)
    config = ServingConfig(
        concurrency=(4,), requests=16, workload=Workload(output_len=16), seed=time.time_ns()
    )
    await run_benchmark([target], config, lambda point: None)


def _parts(server: RunningServer) -> dict[str, float]:
    """Of the lines that `torchweave serve` writes when it is ready."""
    said = server.says("[Serve] ready:", PARTS_WITHIN_S)
    lines = re.findall(r"(?:start-up [\d.]+ s|seconds): ([\w, .]+)", said)
    return {name: float(s) for line in lines for name, s in re.findall(r"(\w+) ([\d.]+)", line)}


def _all(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in parts.items()}
