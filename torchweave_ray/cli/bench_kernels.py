"""`torchweave bench kernels`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def kernels(
    model: Annotated[
        list[str] | None, typer.Option(help="smollm2-135m, tinyllama-1.1b; default: both.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Rows of a product; several: 1,4,16.")] = "1,4,16,32",
    threads: Annotated[
        int | None, typer.Option(help="Default: all cores of this process.", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="To spend on each figure.", min=0.0)] = 0.2,
) -> None:
    """Measure the CPU kernels' products by shape, beside torch's own.

    One JSON line a point on stdout, then a table. Exit status 1 where there are no kernels.
    """
    from rich.console import Console
    from rich.table import Table

    from torchweave_ray.bench.kernels import SHAPES, measure_products
    from torchweave_ray.bench.origin import describe_machine
    from torchweave_ray.cli.bench import positive_numbers
    from torchweave_ray.kernels.library import KernelsUnavailable, load_library

    chosen = model or list(SHAPES)
    for name in chosen:
        if name not in SHAPES:
            raise typer.BadParameter(f"one of {', '.join(SHAPES)}", param_hint="--model")
    try:
        library = load_library()
    except KernelsUnavailable as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    team = library.create_team(threads or describe_machine().cores)
    title = f"{library.isa}, {team.num_threads} threads; torch: its bf16 linear"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("product", "rows", "GB/s", "GFLOP/s", "us", "torch us"):
        table.add_column(column, justify="left" if column == "product" else "right")
    numbers = positive_numbers(rows, "--rows")
    for p in measure_products(team, chosen, numbers, seconds):
        print(json.dumps(p.to_dict()), flush=True)
        cells = (p.rows, p.gbyte_s, p.gflop_s, p.native_us, p.torch_us)
        table.add_row(f"{p.model} {p.product}", *map(str, cells))
    Console(stderr=True).print(table)
