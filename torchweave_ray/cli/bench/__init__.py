"""`torchweave bench`: one file a command, in the order of the help. Measures nothing itself."""

from __future__ import annotations

import typer

from torchweave_ray.cli.bench.kernels import kernels
from torchweave_ray.cli.bench.reports import compare, plot
from torchweave_ray.cli.bench.routing import routing
from torchweave_ray.cli.bench.scenarios import interference, prefix
from torchweave_ray.cli.bench.serving import serving
from torchweave_ray.cli.bench.startup import startup
from torchweave_ray.cli.bench.throughput import throughput
from torchweave_ray.cli.bench.transport import transport

COMMANDS = (
    serving,
    throughput,
    prefix,
    interference,
    routing,
    startup,
    transport,
    kernels,
    plot,
    compare,
)


def add_commands(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure speed.", no_args_is_help=True)
    for command in COMMANDS:
        group.command()(command)
    app.add_typer(group, name="bench")
