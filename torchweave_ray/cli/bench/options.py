"""Options that several benchmarks share, and how they report: JSON lines on stdout, tables on
stderr, a results file."""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from torchweave_ray.bench.report.points import Point

N = TypeVar("N", int, float)

RESULTS = Path("benchmarks/results")
DEFAULT_URL = "http://127.0.0.1:8000"

TokenizerFile = Annotated[
    Path | None, typer.Option(exists=True, help="tokenizer.json: send exact token ids.")
]
Concurrency = Annotated[str, typer.Option(help="Clients at once; several points: 1,4,16,32.")]
Requests = Annotated[
    int | None,
    typer.Option("--requests", "--iters", help="Requests a point. Default: 3 a client, >= 8."),
]
InputLen = Annotated[int, typer.Option(help="Words of a prompt; tokens with --tokenizer.", min=1)]
OutputLen = Annotated[
    int, typer.Option(help="Tokens to generate; the end token is ignored.", min=1)
]
Seed = Annotated[
    int | None,
    typer.Option(help="Of the prompts. Default: new each time, for a server remembers prefixes."),
]
Save = Annotated[bool, typer.Option("--save", help="Write a results file with its origin.")]
Results = Annotated[Path, typer.Option(help="Folder of the results file.")]
AsJson = Annotated[bool, typer.Option("--json", help="The JSON lines alone, without the table.")]


def positive_numbers(text: str, option: str) -> tuple[int, ...]:
    return _positive(text, option, int, "numbers such as 1,4,16")


def positive_rates(text: str, option: str) -> tuple[float, ...]:
    return _positive(text, option, float, "numbers such as 0.5,1,2")


def _positive(text: str, option: str, kind: type[N], example: str) -> tuple[N, ...]:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise typer.BadParameter(f"{text!r}: {example}", param_hint=option)
    return values


def new_seed(seed: int | None) -> int:
    return secrets.randbelow(2**31) if seed is None else seed


def print_line(point: Point) -> None:
    print(json.dumps(point.to_dict()), flush=True)


def save(folder: Path, kind: str, config: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    from torchweave_ray.bench.origin import save_results

    path = save_results(kind, config, lines, folder)
    print(f"saved {path}", file=sys.stderr)
    return path


def print_table(points: list[Point], as_json: bool, footer: Sequence[str] = ()) -> None:
    """On stderr, so that stdout stays JSON lines. `as_json`: only what is wrong."""
    from rich.console import Console

    from torchweave_ray.bench.report.tables import failures, points_table

    console = Console(stderr=True)
    if not as_json:
        console.print(points_table(points))
    for line in (*(() if as_json else footer), *failures(points)):
        console.print(line, markup=False)
