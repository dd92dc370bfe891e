"""`torchweave doctor`: what this machine has, whether anything stands in the way of serving, and
how fast models should decode here."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from torchweave_ray.bench.forecast import Capacity, Forecast
    from torchweave_ray.cli.checks import Check

MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "fail": "[red]problem[/]"}


def doctor(
    port: Annotated[
        int, typer.Option(help="The port that `torchweave serve` would take.", min=1, max=65535)
    ] = 8000,
    measure: Annotated[
        bool, typer.Option(help="Measure memory and arithmetic for a second or two.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at Python, packages, CPU, memory, device, kernels, artifacts and ports, and say which
    models fit and how fast they should decode.

    Exit status 1 if there is a real problem.
    """
    from torchweave_ray.cli.checks import run_checks

    checks = run_checks(port)
    capacity, forecasts = _forecast() if measure and _can_measure(checks) else (None, [])
    if as_json:
        print(json.dumps(_values(checks, capacity, forecasts)))
    else:
        _print(checks, capacity, forecasts)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _can_measure(checks: list[Check]) -> bool:
    return all(check.status != "fail" for check in checks if check.name in ("packages", "device"))


def _forecast() -> tuple[Capacity, list[Forecast]]:
    from torchweave_ray.bench.forecast import (
        forecast_artifact,
        forecast_sizes,
        measure_capacity,
    )
    from torchweave_ray.cli.checks import artifact_folders, device_and_memory
    from torchweave_ray.errors import TorchWeaveError

    capacity = measure_capacity(*device_and_memory())
    found = []
    for folder in artifact_folders():
        try:
            found.append(forecast_artifact(folder, capacity))
        except TorchWeaveError:  # the checks say what is wrong with it
            continue
    return capacity, [*filter(None, found), *forecast_sizes(capacity)]


def _values(
    checks: list[Check], capacity: Capacity | None, forecasts: list[Forecast]
) -> dict[str, Any]:
    from torchweave_ray.bench.origin import describe_origin

    values: dict[str, Any] = {c.name: {"status": c.status, "detail": c.detail} for c in checks}
    values["artifacts"] = [asdict(c) for c in checks if c.name == "artifact"]
    if capacity is not None:
        values |= {"capacity": asdict(capacity), "forecast": [f.to_dict() for f in forecasts]}
    return values | {"origin": asdict(describe_origin())}


def _print(checks: list[Check], capacity: Capacity | None, forecasts: list[Forecast]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        table.add_row(MARKS[check.status], check.name, escape(check.detail))
    # In a file or a pipe lines stay whole.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    if capacity is not None:
        _print_forecast(console, capacity, forecasts)


def _print_forecast(console: Console, capacity: Capacity, forecasts: list[Forecast]) -> None:
    memory = capacity.memory_bytes / 2**30
    cores = os.cpu_count() or 1
    if (load := os.getloadavg()[0]) > 0.5 * cores:
        busy = f"{load:.1f} processes want its {cores} cores"
        console.print(f"\n[yellow]The machine is busy: {busy}. Measured is what they leave.[/]")
    speeds = capacity.multiply_gflop_s
    each = ", ".join(
        f"{speeds[kind]:,.0f} in {kind}" for kind in ("bf16", "int8") if kind in speeds
    )
    console.print(
        f"\n{capacity.device} reads {capacity.read_gbyte_s:g} GB/s and multiplies, in GFLOP/s, "
        f"{each} (by {capacity.by}), so models should decode, within a factor of 2:\n",
        markup=False,
        highlight=False,
    )
    console.print(_forecast_table(forecasts))
    console.print(
        f"\nWhat does not fit needs more than the {memory:.1f} GiB here with 1.5 GiB beside its "
        "weights. How this is worked out: docs/performance.md",
        style="dim",
        highlight=False,
    )


def _forecast_table(forecasts: list[Forecast]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "weights", "GiB", "tok/s, 1 client", "16 clients", "one waits for"):
        is_text = column in ("model", "weights", "one waits for")
        table.add_column(column, justify="left" if is_text else "right")
    for f in forecasts:
        size = f"{f.weight_bytes / 2**30:.1f}"
        if f.fits:
            speeds = [
                f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}" for speed in f.tok_s.values()
            ]
            table.add_row(f.name, f.format, size, *speeds, f.bound)
        else:
            table.add_row(f.name, f.format, size, "-", "-", "does not fit", style="dim")
    return table
