"""Puts the commands together. Knows their names and order, nothing of what they do."""

from __future__ import annotations

import typer

from torchweave_ray.cli import artifact
from torchweave_ray.cli.batch import batch
from torchweave_ray.cli.bench import serving, throughput
from torchweave_ray.cli.bench_kernels import kernels
from torchweave_ray.cli.bench_routing import routing
from torchweave_ray.cli.bench_scenarios import interference, prefix
from torchweave_ray.cli.bench_startup import startup
from torchweave_ray.cli.bench_transport import transport
from torchweave_ray.cli.doctor import doctor
from torchweave_ray.cli.generate import generate
from torchweave_ray.cli.optimize import optimize
from torchweave_ray.cli.serve import serve


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="torchweave",
        help="LLM inference: Ray Serve in front, continuous batching behind.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.command()(serve)
    app.command()(generate)
    app.command()(batch)
    app.command()(optimize)
    artifact.add_commands(app)
    app.command()(doctor)
    bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
    bench.command()(serving)
    bench.command()(throughput)
    bench.command()(prefix)
    bench.command()(interference)
    bench.command()(routing)
    bench.command()(startup)
    bench.command()(transport)
    bench.command()(kernels)
    app.add_typer(bench, name="bench")
    return app
