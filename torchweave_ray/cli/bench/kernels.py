"""`torchweave bench kernels`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from torchweave_ray.cli.bench.options import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from torchweave_ray.bench.kernels import Ceilings


def kernels(
    model: Annotated[
        list[str] | None, typer.Option(help="smollm2-135m, tinyllama-1.1b; default: both.")
    ] = None,
    formats: Annotated[
        str, typer.Option(help="Of the weights: bf16, int8, int8-group32, int4-group32.")
    ] = "bf16,int8,int8-group32,int4-group32",
    rows: Annotated[str, typer.Option(help="Rows of a product; several: 1,4,16.")] = "1,4,16,32",
    threads: Annotated[
        int | None, typer.Option(help="Default: all cores of this process.", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="To spend on each figure.", min=0.0)] = 0.2,
    as_json: AsJson = False,
) -> None:
    """Measure the CPU kernels' products by shape and format, beside torch's own and beside what the
    machine can do at most.

    One JSON line a point on stdout, the ceilings first; then a table. Exit status 1 where there
    are no kernels.
    """
    from rich.console import Console

    from torchweave_ray.bench.kernels import FORMATS, SHAPES, measure_ceilings, measure_products
    from torchweave_ray.bench.origin import describe_machine
    from torchweave_ray.cli.bench.options import positive_numbers
    from torchweave_ray.kernels.library import KernelsUnavailable, load_library

    chosen = model or list(SHAPES)
    for name in chosen:
        if name not in SHAPES:
            raise typer.BadParameter(f"one of {', '.join(SHAPES)}", param_hint="--model")
    kinds = [known for known in FORMATS if known in formats.split(",")]
    if len(kinds) != len(formats.split(",")):
        raise typer.BadParameter(f"some of {','.join(FORMATS)}", param_hint="--formats")
    try:
        library = load_library()
    except KernelsUnavailable as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    team = library.create_team(threads or describe_machine().cores)
    ceilings = measure_ceilings(team, seconds)
    print(json.dumps(ceilings.to_dict()), flush=True)
    table = _table(library.isa, team.num_threads, ceilings)
    numbers = positive_numbers(rows, "--rows")
    for p in measure_products(team, chosen, kinds, numbers, seconds):
        print(json.dumps(p.to_dict()), flush=True)
        cells = (p.format, p.rows, p.gbyte_s, p.gflop_s, p.native_us, p.torch_us)
        table.add_row(f"{p.model} {p.product}", *map(str, cells))
    if not as_json:
        Console(stderr=True).print(table)


def _table(isa: str, threads: int, ceilings: Ceilings) -> Table:
    from rich.table import Table

    title = (
        f"{isa}, {threads} threads; at most {ceilings.read_gbyte_s} GB/s, "
        f"{ceilings.bf16_gflop_s} GFLOP/s in bf16, {ceilings.int8_gflop_s} in int8; "
        "torch: its bf16 linear"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("product", "format", "rows", "GB/s", "GFLOP/s", "us", "torch us"):
        is_text = column in ("product", "format")
        table.add_column(column, justify="left" if is_text else "right")
    return table
