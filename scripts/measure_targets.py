"""Every target of a recipe measured in one run, with a verdict a row and a results file.

python scripts/measure_targets.py --recipe smollm2-135m [--rows load,tax] [--save]

Calls `torchweave optimize`, `serve` and `bench ...` as a person would and reads their JSON lines.
With `--url` it measures a server that runs already (a peer): HTTP rows only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchweave_ray.bench.origin import RESULTS, save_results
from torchweave_ray.bench.process_tree import wait_until_calm
from torchweave_ray.bench.server_process import ServerFailed, started_server

Line = dict[str, Any]
ROWS = ("load", "batching", "prefix", "interference", "tax", "first-token", "ready", "memory")
OVER_HTTP = ("load", "prefix", "interference")
"""What any OpenAI-compatible server can be asked."""
TAX_AT = 16


@dataclass(frozen=True, slots=True)
class Targets:
    tok_s: Mapping[int, float]
    """Output tokens a second by the number of clients."""
    ttft_s_at_16: float | None = None
    output_len: int = 128
    long_len: int | None = 4000
    """Of the prompt that others wait beside; None: the model's context is too short for one."""
    requests: int = 3
    """A client."""
    prefix_rounds: int = 5


TARGETS = {
    "smollm2-135m": Targets({1: 90, 4: 260, 16: 550, 32: 600}, ttft_s_at_16=0.7),
    "smollm2-135m-int8": Targets({1: 150, 4: 400, 16: 900, 32: 1100}),
    "smollm2-135m-int4": Targets({1: 180, 4: 400, 16: 900, 32: 1100}),
    "tinyllama-shape": Targets(
        # 13.2 is llama.cpp's; measure it beside with --url.
        {1: 13.2, 4: 42, 16: 60},
        output_len=64,
        long_len=None,
        requests=2,
        prefix_rounds=2,
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    row: str
    figure: float | None
    """None: it could not be measured; `note` says why."""
    target: float
    at_least: bool = True
    note: str = ""

    @property
    def met(self) -> bool:
        if self.figure is None:
            return False
        return self.figure >= self.target if self.at_least else self.figure <= self.target

    def to_dict(self) -> Line:
        figure = None if self.figure is None else round(self.figure, 3)
        sign = ">=" if self.at_least else "<="
        line = {"row": self.row, "figure": figure, "target": f"{sign} {self.target:g}"}
        return {**line, "met": self.met, **({"note": self.note} if self.note else {})}


@dataclass(slots=True)
class Run:
    """Commands as they are given, and all JSON lines that they printed, by the row they are for."""

    recipe: str
    targets: Targets
    lines: dict[str, list[Line]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def bench(self, row: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "torchweave_ray.cli", "bench", *arguments]
        print(f"[{row}] torchweave bench {' '.join(arguments)}", file=sys.stderr, flush=True)
        ran = subprocess.run(command, capture_output=True, text=True)
        found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
        self.lines[row] = self.lines.get(row, []) + found
        if ran.returncode:
            self.failures[row] = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]


def measure_http(run: Run, rows: Sequence[str], url: str) -> None:
    targets = run.targets
    size = ("--output-len", str(targets.output_len))
    if {"load", "tax"} & set(rows):
        for clients in targets.tok_s if "load" in rows else (TAX_AT,):
            requests = str(max(8, targets.requests * clients))
            load = ("--url", url, "--concurrency", str(clients), "--requests", requests)
            run.bench("load", "serving", *load, *size)
    if "batching" in rows:
        ends = ("--sse", f"{url}/v1/generate", "--nobatch", f"{url}/v1/generate_nobatch")
        run.bench("batching", "serving", "--concurrency", "4", "--requests", "8", *size, *ends)
    if "prefix" in rows:
        run.bench("prefix", "prefix", "--url", url, "--rounds", str(targets.prefix_rounds))
    if "interference" in rows and targets.long_len:
        run.bench("interference", "interference", "--url", url, "--long-len", str(targets.long_len))


def measure_served(run: Run, rows: Sequence[str]) -> None:
    """The same against a server of our own; one that does not start costs its rows only."""
    over_http = {*OVER_HTTP, "batching", "tax"} & set(rows)
    if not over_http:
        return
    try:
        with started_server(("--recipe", run.recipe, "--no-dashboard")) as server:
            if not wait_until_calm(server.pid):
                print("the server is not calm: measuring anyway", file=sys.stderr)
            measure_http(run, rows, server.url)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        run.failures |= dict.fromkeys(over_http - set(run.lines), "the server did not start")


def measure_in_process(run: Run, rows: Sequence[str]) -> None:
    model = ("--model", run.recipe)
    if "tax" in rows:
        requests = str(run.targets.requests * TAX_AT)
        load = ("--concurrency", str(TAX_AT), "--requests", requests)
        size = ("--output-len", str(run.targets.output_len))
        run.bench("tax", "throughput", *model, *load, *size)
    for row in ("first-token", "ready", "memory"):
        if row in rows:
            run.bench(row, "startup", *model, "--measure", row)


def verdicts(run: Run, rows: Sequence[str]) -> list[Row]:
    """A row without lines is there too, unmet, with the reason."""
    return [row for name in rows for row in _VERDICTS[name](run)]


def _load(run: Run) -> Iterator[Row]:
    points = {line["concurrency"]: line for line in run.lines.get("load", ())}
    note = run.failures.get("load", "")
    for clients, target in run.targets.tok_s.items():
        rate = points.get(clients, {}).get("output_tok_s")
        yield Row(f"tok/s at c={clients}", rate, target, note=note)
    if run.targets.ttft_s_at_16 is not None:
        ttft = points.get(16, {}).get("ttft_ms", {}).get("p50")
        seconds = None if ttft is None else ttft / 1e3
        yield Row("TTFT p50 at c=16, s", seconds, run.targets.ttft_s_at_16, False, note)


def _batching(run: Run) -> Iterator[Row]:
    rates = {line["target"]: line["output_tok_s"] for line in run.lines.get("batching", ())}
    note = run.failures.get("batching", "")
    gain = _ratio(rates.get("sse"), rates.get("nobatch"))
    yield Row("batching gain at c=4", gain, 2.5, note=note)


def _prefix(run: Run) -> Iterator[Row]:
    name = "ttft_cached_over_uncached"
    note = run.failures.get("prefix", "")
    yield Row("TTFT with a cached prefix / without", _named(run, "prefix", name), 0.15, False, note)


def _interference(run: Run) -> Iterator[Row]:
    if run.targets.long_len is None:
        return
    note = run.failures.get("interference", "")
    for name, label, target in (
        ("ttft_meanwhile_over_idle", "TTFT beside a long prompt / idle", 3.0),
        ("itl_p99_meanwhile_over_idle", "ITL p99 beside a long prompt / idle", 4.0),
    ):
        yield Row(label, _named(run, "interference", name), target, False, note)


def _tax(run: Run) -> Iterator[Row]:
    served = _rate_at(run.lines.get("load", ()), TAX_AT)
    alone = _rate_at(run.lines.get("tax", ()), TAX_AT)
    note = run.failures.get("load") or run.failures.get("tax", "")
    yield Row("HTTP / in process at c=16", _ratio(served, alone), 0.85, note=note)


def _first_token(run: Run) -> Iterator[Row]:
    note = run.failures.get("first-token", "")
    seconds = _median([line["seconds"] for line in run.lines.get("first-token", ())])
    yield Row("process start to first token, s", seconds, 4.0, False, note)


def _ready(run: Run) -> Iterator[Row]:
    note = run.failures.get("ready", "")
    lines = run.lines.get("ready", ())
    for profile in ("default", "haproxy"):
        of_app = {
            app: _median(
                [x["seconds"] for x in lines if (x["profile"], x["app"]) == (profile, app)]
            )
            for app in ("model", "empty")
        }
        model, empty = of_app["model"], of_app["empty"]
        beyond = None if model is None or empty is None else model - empty
        yield Row(f"ready after an empty application, {profile}, s", beyond, 8.0, False, note)


def _memory(run: Run) -> Iterator[Row]:
    note = run.failures.get("memory", "touched KV cache included")
    lines = run.lines.get("memory", ())
    largest = max(lines[0]["uss_mib"]) if lines else None
    yield Row("USS of one of two replicas, MiB", largest, 400.0, False, note)


_VERDICTS: Mapping[str, Callable[[Run], Iterator[Row]]] = {
    "load": _load,
    "batching": _batching,
    "prefix": _prefix,
    "interference": _interference,
    "tax": _tax,
    "first-token": _first_token,
    "ready": _ready,
    "memory": _memory,
}


def _named(run: Run, row: str, name: str) -> float | None:
    return next((line[name] for line in run.lines.get(row, ()) if name in line), None)


def _rate_at(lines: Sequence[Line], clients: int) -> float | None:
    return next((x["output_tok_s"] for x in lines if x["concurrency"] == clients), None)


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", choices=sorted(TARGETS), default="smollm2-135m")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--url", help="measure this server, over HTTP only")
    parser.add_argument("--save", action="store_true", help="write a results file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.rows = [name for name in arguments.rows.split(",") if name]
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"--rows: {sorted(unknown)[0]!r} is none of {','.join(ROWS)}")
    if arguments.url:
        arguments.rows = [name for name in arguments.rows if name in OVER_HTTP]
    return arguments


def main() -> None:
    arguments = _arguments()
    started = time.perf_counter()
    run = Run(arguments.recipe, TARGETS[arguments.recipe])
    if arguments.url:
        measure_http(run, arguments.rows, arguments.url.rstrip("/"))
    else:
        stage = [sys.executable, "-m", "torchweave_ray.cli", "optimize", arguments.recipe]
        subprocess.run(stage, check=True, stdout=subprocess.DEVNULL)
        measure_served(run, arguments.rows)
        measure_in_process(run, arguments.rows)
    rows = verdicts(run, arguments.rows)
    for row in rows:
        print(json.dumps(row.to_dict()), flush=True)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if arguments.save:
        config = {"recipe": arguments.recipe, "rows": arguments.rows, "url": arguments.url}
        measured = [{"for": name, **line} for name, lines in run.lines.items() for line in lines]
        points = [*(row.to_dict() for row in rows), *measured]
        print(
            f"saved {save_results('targets', config, points, arguments.results)}", file=sys.stderr
        )
    sys.exit(0 if all(row.figure is not None for row in rows) else 1)


if __name__ == "__main__":
    main()
