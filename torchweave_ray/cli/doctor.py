"""`torchweave doctor`: what this machine has, and whether anything stands in the way of serving."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torchweave_ray.cli.checks import Check

MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "fail": "[red]problem[/]"}


def doctor(
    port: Annotated[int, typer.Option(help="The port that `torchweave serve` would take.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at Python, packages, CPU, memory, device, kernels, artifacts and ports.

    Exit status 1 if there is a real problem.
    """
    from torchweave_ray.cli.checks import run_checks

    checks = run_checks(port)
    if as_json:
        print(json.dumps({c.name: {"status": c.status, "detail": c.detail} for c in checks}))
    else:
        _print_table(checks)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        table.add_row(MARKS[check.status], check.name, escape(check.detail))
    Console().print(table)
