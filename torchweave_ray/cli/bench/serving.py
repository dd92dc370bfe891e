"""`torchweave bench serving`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchweave_ray.cli.bench.options import (
    DEFAULT_URL,
    RESULTS,
    Concurrency,
    InputLen,
    OutputLen,
    Requests,
    Results,
    Save,
    Seed,
    TokenizerFile,
    new_seed,
    positive_numbers,
    print_line,
    print_table,
    save,
)

if TYPE_CHECKING:
    from torchweave_ray.bench.load.serving import ServingConfig
    from torchweave_ray.bench.load.targets import Target
    from torchweave_ray.bench.report.points import Point

Sse = Annotated[
    str | None, typer.Option(help="Measure this /v1/generate address instead of --url.")
]
Unbatched = Annotated[
    str | None, typer.Option(help="Measure this /v1/generate_nobatch address too.")
]
CpuOf = Annotated[
    list[int] | None,
    typer.Option(help="Process id of the server: report its tree's CPU ms a token."),
]


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
    from torchweave_ray.bench.load.serving import ServingConfig
    from torchweave_ray.bench.load.targets import run_in_loop
    from torchweave_ray.bench.report.tables import unbatched_gain

    config = ServingConfig(
        concurrency=positive_numbers(concurrency, "--concurrency"),
        requests=requests,
        input_len=input_len,
        output_len=output_len,
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
    from torchweave_ray.bench.load.serving import run_benchmark

    targets = await _targets(url, endpoint, model, sse, nobatch)
    return targets, await run_benchmark(targets, config, print_line)


async def _targets(
    url: str, endpoint: str, model: str | None, sse: str | None, nobatch: str | None
) -> list[Target]:
    from torchweave_ray.bench.load.targets import ENDPOINTS, native_target, openai_target

    if endpoint not in ENDPOINTS:
        raise typer.BadParameter(f"one of {', '.join(ENDPOINTS)}", param_hint="--endpoint")
    targets = []
    if sse is not None:
        targets.append(native_target("sse", sse))
    if nobatch is not None:
        targets.append(native_target("nobatch", nobatch))
    return targets or [await openai_target(url, endpoint, model)]


def _set_values(config: ServingConfig) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(config).items() if v not in (None, ())}
