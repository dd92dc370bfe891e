"""Puts the commands together. Knows their names and order, nothing of what they do."""

from __future__ import annotations

import typer

from torchweave_ray.cli import artifact, bench, keys
from torchweave_ray.cli.batch import batch
from torchweave_ray.cli.chat import chat
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
    app.command()(chat)
    app.command()(generate)
    app.command()(batch)
    app.command()(optimize)
    artifact.add_commands(app)
    keys.add_commands(app)
    app.command()(doctor)
    bench.add_commands(app)
    return app
