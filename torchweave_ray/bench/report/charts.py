"""Results as PNG and SVG: throughput against latency, TTFT distribution, batch over time.

Needs matplotlib (the extra `bench`). Draws what results files hold and computes nothing new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torchweave_ray.bench.report.results import (
    Point,
    Results,
    Series,
    load_of,
    machine_of,
    series_of,
)
from torchweave_ray.errors import ConfigError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's: told apart by the colour-blind, too."""
MARKERS = "osD^v<"
FORMATS = ("png", "svg")
MAX_PANELS = 6
STYLE = {
    "svg.fonttype": "none",  # labels stay text
    "svg.hashsalt": "torchweave",  # the same picture is the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def draw_charts(
    results: Sequence[Results], folder: Path, name: str, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `<name>-<chart>.<format>` for each chart that the results have data for.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        message = "plots need matplotlib: pip install 'torchweave-ray[bench]'"
        raise ConfigError(message) from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for chart, figure in _figures(results):
            figure.text(0.995, 0.005, machine_of(results[0]), ha="right", size=7, color="#777777")
            for kind in formats:
                paths.append(folder / f"{name}-{chart}.{kind}")
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(paths[-1], dpi=150, metadata=metadata)
            matplotlib.pyplot.close(figure)
    return paths


def _figures(results: Sequence[Results]) -> Iterator[tuple[str, Any]]:
    series = series_of(results)
    if any("ttft_ms" in p for each in series for p in each.points):
        yield "throughput", _throughput(series)
    if any("ttft_ms_each" in p for each in series for p in each.points):
        yield "ttft", _ttft(series)
    if any("occupancy" in p for each in series for p in each.points):
        yield "batch", _batch(series)


def _new(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    line = 0.2 / size[1]  # at the foot, for where it was measured
    figure.get_layout_engine().set(rect=(0, line, 1, 1 - line))
    return figure, grid


def _throughput(series: Sequence[Series]) -> Any:
    """Median as a line with the load at each point, p99 as a thin one; the share of good requests
    where there was a service level."""
    has_level = any("good_share" in p for each in series for p in each.points)
    figure, (row,) = _new(1, 3 if has_level else 2, (14 if has_level else 10, 4.4))
    for axes, key, title in (
        (row[0], "ttft_ms", "Time to first token"),
        (row[1], "itl_ms", "Gap between texts (ITL)"),
    ):
        for number, each in enumerate(series):
            points = [p for p in each.points if key in p]
            p50, p99 = ([p[key][q] for p in points] for q in ("p50", "p99"))
            x = [p["output_tok_s"] for p in points]
            axes.plot(x, p50, **_style(number), label=each.name)
            axes.plot(x, p99, **_style(number, ls=":", lw=0.8, ms=3), label=f"{each.name}, p99")
            _mark_loads(axes, points, zip(x, p50, strict=True))
        axes.set(title=title, xlabel="output tokens a second", ylabel="ms", yscale="log")
        axes.set_xlim(left=0)
        axes.margins(y=0.15)
        _plain_ticks(axes.yaxis)
    row[0].legend(loc="upper left", fontsize=8)
    if has_level:
        _draw_good(row[2], series)
    return figure


def _draw_good(axes: Any, series: Sequence[Series]) -> None:
    for number, each in enumerate(series):
        points = [p for p in each.points if "good_share" in p]
        x, y = ([p[key] for p in points] for key in ("output_tok_s", "good_share"))
        axes.plot(x, [100 * share for share in y], **_style(number), label=each.name)
        _mark_loads(axes, points, zip(x, (100 * share for share in y), strict=True))
    axes.set(
        title="Kept the service level", xlabel="output tokens a second", ylabel="% of requests"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(-8, 105)


def _style(number: int, **more: Any) -> dict[str, Any]:
    of_it = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    return of_it | more


def _mark_loads(axes: Any, points: Sequence[Point], places: Iterable[tuple[float, float]]) -> None:
    for point, at in zip(points, places, strict=True):
        axes.annotate(load_of(point), at, (0, -12), textcoords="offset points", size=7, ha="center")


def _ttft(series: Sequence[Series]) -> Any:
    """A panel a target, a line a load: the share of requests whose first text was there by then."""
    shown = [s for s in series if any("ttft_ms_each" in p for p in s.points)]
    figure, (row,) = _new(1, len(shown), (5 * len(shown), 4.2), sharey=True, sharex=True)
    from matplotlib import colormaps

    for axes, each in zip(row, shown, strict=True):
        points = [p for p in each.points if "ttft_ms_each" in p]
        for number, point in enumerate(points):
            shade = colormaps["viridis"](0.9 * number / max(1, len(points) - 1))
            axes.ecdf(point["ttft_ms_each"], color=shade, label=load_of(point))
        axes.set(title=each.name, xlabel="time to first token, ms", xscale="log")
        axes.legend(fontsize=8, loc="lower right")
        _plain_ticks(axes.xaxis)
    row[0].set_ylabel("share of requests")
    return figure


def _batch(series: Sequence[Series]) -> Any:
    """A panel a load, at most MAX_PANELS of them: the requests that run, those that wait on top."""
    shown = [(s.name, p) for s in series for p in s.points if "occupancy" in p]
    if len(shown) > MAX_PANELS:  # the extremes and what lies evenly between
        step = (len(shown) - 1) / (MAX_PANELS - 1)
        shown = [shown[round(i * step)] for i in range(MAX_PANELS)]
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = _new(rows, columns, (3.6 * columns, 2.6 * rows + 0.4), sharey=True)
    most = 1.0
    for axes, (name, point) in zip(grid.flat, shown, strict=False):
        occupancy = point["occupancy"][0]
        at, running = occupancy["at_s"], occupancy["running"]
        total = [r + w for r, w in zip(running, occupancy["waiting"], strict=True)]
        most = max(most, *total)
        axes.fill_between(at, total, running, step="post", color="#e69f00", label="waiting")
        axes.fill_between(at, running, step="post", color="#0072b2", label="running")
        axes.set_title(f"{name}, {load_of(point)}", size=9)
        axes.set_xlabel("s")
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("requests")
    grid[0][0].set_ylim(bottom=0, top=1.1 * most)  # of all: they share it
    grid[0][0].legend(fontsize=8, loc="upper left")
    return figure


def _plain_ticks(axis: Any) -> None:
    """20, 50, 100, 200: not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axis.set_minor_formatter(NullFormatter())
