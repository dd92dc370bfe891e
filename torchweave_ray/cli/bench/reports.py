"""`torchweave bench plot|compare`: what results files say. They measure nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torchweave_ray.bench.report.compare import Change

Files = Annotated[list[Path], typer.Argument(help="Files of `bench serving --save`.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
COLOURS = {"better": "green", "worse": "red", "same": "", "shown": "dim"}


def plot(
    files: Files,
    out: Annotated[
        Path | None, typer.Option(help="Folder for images. Default: draw in the terminal.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What file names begin with. Default: the first file's.")
    ] = None,
    formats: Annotated[str, typer.Option(help="Some of png, svg.")] = "png,svg",
    as_json: AsJson = False,
) -> None:
    """Draw throughput against latency, the distribution of TTFT and the batch over time.

    Several files are drawn together. The batch is there if --occupancy was.
    """
    from torchweave_ray.bench.report.charts import FORMATS, draw_charts
    from torchweave_ray.bench.report.results import read_results
    from torchweave_ray.bench.report.terminal import terminal_charts

    kinds = [kind.strip() for kind in formats.split(",")]
    if set(kinds) - set(FORMATS):
        raise typer.BadParameter(f"some of {', '.join(FORMATS)}", param_hint="--formats")
    results = [read_results(path) for path in files]
    if out is None:
        if as_json:
            raise typer.BadParameter("names the images of --out", param_hint="--json")
        for chart in terminal_charts(results, colour=sys.stdout.isatty()):
            print(chart)
        return
    paths = draw_charts(results, out, name or files[0].stem, kinds)
    print(json.dumps({"images": list(map(str, paths))}) if as_json else "\n".join(map(str, paths)))


def compare(
    before: Annotated[Path, typer.Argument(help="A results file.")],
    after: Annotated[Path, typer.Argument(help="A later one of the same work.")],
    tolerance: Annotated[
        float, typer.Option(help="A change within this share is none.", min=0.0)
    ] = 0.15,
    as_json: AsJson = False,
) -> None:
    """Compare two results of `bench serving`. Exit status 1: something became worse.

    Judged are rates and medians of each target and load that both have.
    """
    from torchweave_ray.bench.report.compare import compare_results, differences
    from torchweave_ray.bench.report.results import read_results

    old, new = read_results(before), read_results(after)
    changes = compare_results(old, new, tolerance)
    notes = list(differences(old, new))
    if as_json:
        print(json.dumps({"notes": notes, "changes": [c.to_dict() for c in changes]}))
    else:
        _print_changes(changes, notes)
    if any(change.verdict == "worse" for change in changes):
        raise typer.Exit(1)


def _print_changes(changes: list[Change], notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("target", "load", "", "before", "after", "change", "verdict"):
        is_text = column in ("target", "load", "", "verdict")
        table.add_column(column, justify="left" if is_text else "right")
    for c in changes:
        cells = [c.target, c.load, c.metric, f"{c.before:,.4g}", f"{c.after:,.4g}"]
        change = f"{100 * (c.ratio - 1):+.1f} %"
        table.add_row(*cells, change, c.verdict, style=COLOURS[c.verdict] or None)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for note in notes:
        console.print(f"not alike: {note}", markup=False)
