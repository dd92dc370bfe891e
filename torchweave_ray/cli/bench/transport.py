"""`torchweave bench transport`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from torchweave_ray.cli.bench.options import (
    RESULTS,
    AsJson,
    Concurrency,
    Results,
    Save,
    Seed,
    new_seed,
    positive_numbers,
    save,
)

if TYPE_CHECKING:
    from rich.table import Table

    from torchweave_ray.bench.transport.measure import TransportPoint


def transport(
    routes: Annotated[
        str | None,
        typer.Option(
            help="Some of process, default, default+bus, one-loop, one-loop+bus, haproxy, "
            "haproxy+bus, with commas. Default: all."
        ),
    ] = None,
    concurrency: Concurrency = "1,32",
    step_ms: Annotated[float, typer.Option(help="Time of a step of the engine.", min=0.0)] = 25.0,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer under load.", min=2)] = 128,
    seed: Seed = None,
    save_it: Save = False,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Measure what a token costs between engine and client: CPU, added TTFT, messages a second.

    The engine, the API, Ray Serve and HTTP are real; in place of the model there is a runner that
    echoes the prompt, a token a step. Starts a server for each route.
    """
    from rich.console import Console

    from torchweave_ray.bench.transport.measure import ROUTES, TransportConfig, measure

    chosen = list(ROUTES) if routes is None else [name.strip() for name in routes.split(",")]
    for name in chosen:
        if name not in ROUTES:
            raise typer.BadParameter(f"of {', '.join(ROUTES)}", param_hint="--routes")
    config = TransportConfig(
        concurrency=positive_numbers(concurrency, "--concurrency"),
        step_ms=step_ms,
        output_len=output_len,
        seed=new_seed(seed),
    )
    points: list[TransportPoint] = []
    for name in chosen:
        for point in measure(name, config):
            print(json.dumps(point.to_dict()), flush=True)
            points.append(point)
    if not as_json:
        Console(stderr=True).print(_table(points))
    if save_it:
        values = {"routes": chosen, **dataclasses.asdict(config)}
        save(results, "transport", values, [p.to_dict() for p in points])
    if any(point.failed for point in points):
        raise typer.Exit(1)


def _table(points: list[TransportPoint]) -> Table:
    from rich.table import Table

    title = "CPU of all processes in ms a token; TTFT p50 and what it adds to the step, in ms"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("route", "c", "CPU/token", "idle cores", "TTFT", "added", "tok/s", "texts/s"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for p in points:
        cells = [f"{p.cpu_ms_per_token:.3f}", f"{p.idle_cores:.2f}"]
        cells += [f"{p.ttft_ms:.1f}", f"{p.added_ttft_ms:.1f}"]
        cells += [f"{p.tok_s:.0f}", f"{p.texts_s:.0f}"]
        table.add_row(p.route, str(p.concurrency), *cells)
    return table
