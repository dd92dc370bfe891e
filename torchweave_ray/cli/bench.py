"""`torchweave bench serving|throughput`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchweave_ray.cli.artifact import EngineFile, Model, artifact_of, read_engine_config

if TYPE_CHECKING:
    from torchweave_ray.bench.points import Point
    from torchweave_ray.bench.serving import ServingConfig, Target
    from torchweave_ray.bench.throughput import ThroughputConfig

RESULTS = Path("benchmarks/results")

DEFAULT_URL = "http://127.0.0.1:8000"

Sse = Annotated[
    str | None, typer.Option(help="Measure this /v1/generate address instead of --url.")
]
Unbatched = Annotated[
    str | None, typer.Option(help="Measure this /v1/generate_nobatch address too.")
]
TokenizerFile = Annotated[
    Path | None, typer.Option(exists=True, help="tokenizer.json: send exact token ids.")
]
CpuOf = Annotated[
    list[int] | None,
    typer.Option(help="Process id of the server: report its tree's CPU ms a token."),
]
Concurrency = Annotated[str, typer.Option(help="Clients at once; several points: 1,4,16,32.")]
Requests = Annotated[
    int | None,
    typer.Option("--requests", "--iters", help="Requests a point. Default: 3 a client, >= 8."),
]
InputLen = Annotated[int, typer.Option(help="Words of a prompt; tokens with --tokenizer.")]
OutputLen = Annotated[int, typer.Option(help="Tokens to generate; the end token is ignored.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Of the prompts. Default: new each time, for a server remembers prefixes."),
]
Save = Annotated[bool, typer.Option("--save", help="Write a results file with its origin.")]
Results = Annotated[Path, typer.Option(help="Folder of the results file.")]


def serving(
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server.")] = DEFAULT_URL,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    name: Annotated[str | None, typer.Option("--model", help="Default: its first.")] = None,
    sse: Sse = None,
    nobatch: Unbatched = None,
    concurrency: Concurrency = "1,4,16,32",
    requests: Requests = None,
    input_len: InputLen = 100,
    output_len: OutputLen = 128,
    warmup: Annotated[int | None, typer.Option(help="Default: one a client.")] = None,
    tokenizer: TokenizerFile = None,
    cpu_of: CpuOf = None,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 600.0,
    seed: Seed = None,
    save_it: Save = False,
    results: Results = RESULTS,
) -> None:
    """Measure a running server with c clients, each sending its next request when answered.

    One JSON line a point on stdout, then a table. Tokens are counted from the server's usage.
    """
    from torchweave_ray.bench.serving import ServingConfig, run_in_loop
    from torchweave_ray.bench.tables import unbatched_gain

    config = ServingConfig(
        concurrency=positive_numbers(concurrency, "--concurrency"),
        requests=requests,
        input_len=_positive("input-len", input_len),
        output_len=_positive("output-len", output_len),
        warmup=warmup,
        seed=new_seed(seed),
        timeout_s=timeout,
        tokenizer=tokenizer,
        cpu_of=tuple(cpu_of or ()),
    )
    try:
        targets, points = run_in_loop(_serving(config, url, endpoint, name, sse, nobatch))
    except ProcessLookupError as error:
        raise typer.BadParameter(str(error), param_hint="--cpu-of") from error
    print_table(points, list(unbatched_gain(points)))
    if save_it:
        addresses = {t.name: f"{t.url} {t.dialect.path}" for t in targets}
        values = {**_set_values(config), "targets": addresses}
        save(results, "serving", values, [p.to_dict() for p in points])
    if any(point.failed for point in points):
        raise typer.Exit(1)


async def _serving(
    config: ServingConfig,
    url: str,
    endpoint: str,
    model: str | None,
    sse: str | None,
    nobatch: str | None,
) -> tuple[list[Target], list[Point]]:
    from torchweave_ray.bench.serving import run_benchmark

    targets = await _targets(url, endpoint, model, sse, nobatch)
    return targets, await run_benchmark(targets, config, print_line)


async def _targets(
    url: str, endpoint: str, model: str | None, sse: str | None, nobatch: str | None
) -> list[Target]:
    from torchweave_ray.bench.serving import ENDPOINTS, native_target, openai_target

    if endpoint not in ENDPOINTS:
        raise typer.BadParameter(f"one of {', '.join(ENDPOINTS)}", param_hint="--endpoint")
    targets = []
    if sse is not None:
        targets.append(native_target("sse", sse))
    if nobatch is not None:
        targets.append(native_target("nobatch", nobatch))
    return targets or [await openai_target(url, endpoint, model)]


def throughput(
    model: Model = None,
    engine: EngineFile = None,
    concurrency: Concurrency = "1,4,16,32",
    requests: Requests = None,
    input_len: InputLen = 100,
    output_len: OutputLen = 128,
    seed: Seed = None,
    save_it: Save = False,
    results: Results = RESULTS,
) -> None:
    """Measure the engine in this process: no HTTP, no Ray.

    The same work as `bench serving`, so the difference is the price of serving.
    """
    from torchweave_ray.bench.throughput import ThroughputConfig, run_throughput

    config = ThroughputConfig(
        concurrency=positive_numbers(concurrency, "--concurrency"),
        requests=requests,
        input_len=_positive("input-len", input_len),
        output_len=_positive("output-len", output_len),
        seed=new_seed(seed),
    )
    engine_config = read_engine_config(engine)
    loaded, points = run_throughput(artifact_of(model), engine_config, config, print_line)
    print_table(points)
    if save_it:
        info = loaded.info
        about = {"model": info.id, "executor": info.executor, "dtype": info.dtype}
        values = {**_set_values(config), **about, "engine": dataclasses.asdict(engine_config)}
        save(results, "throughput", values, [p.to_dict() for p in points])


def positive_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise typer.BadParameter(f"{text!r}: numbers such as 1,4,16", param_hint=option)
    return values


def new_seed(seed: int | None) -> int:
    return secrets.randbelow(2**31) if seed is None else seed


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise typer.BadParameter("must be at least 1", param_hint=f"--{name}")
    return value


def print_line(point: Point) -> None:
    print(json.dumps(point.to_dict()), flush=True)


def _set_values(config: ServingConfig | ThroughputConfig) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(config).items() if v not in (None, ())}


def save(folder: Path, kind: str, config: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    from torchweave_ray.bench.origin import save_results

    path = save_results(folder, kind, config, lines)
    print(f"saved {path}", file=sys.stderr)


def print_table(points: list[Point], footer: Sequence[str] = ()) -> None:
    """On stderr, so that stdout stays JSON lines."""
    from rich.console import Console

    from torchweave_ray.bench.tables import failures, points_table

    console = Console(stderr=True)
    console.print(points_table(points))
    for line in (*footer, *failures(points)):
        console.print(line, markup=False)
