"""Results as PNG and SVG: throughput against latency, TTFT distribution, batch over time.

Needs matplotlib (the extra `bench`). Draws what results files hold and computes nothing new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchweave_ray.bench.report.results import (
    Point,
    Results,
    Series,
    load_of,
    machine_of,
    series_of,
    work_of,
)
from torchweave_ray.errors import ConfigError

Level = Mapping[str, float]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's: told apart by the colour-blind, too."""
MARKERS = "osD^v<"
FORMATS = ("png", "svg")
MAX_COLUMNS, MAX_ROWS = 5, 4
"""Of panels that show a batch: loads, and targets."""
SOFT = "#6b7280"
STYLE = {
    "svg.fonttype": "none",  # labels stay text
    "svg.hashsalt": "torchweave",  # the same picture is the same file
    "font.size": 10,
    "text.color": "#1f2937",
    "axes.labelcolor": "#374151",
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10.5,
    "axes.titlepad": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 9,
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
            figure.text(0.008, 0.012, work_of(results), size=8, color=SOFT)
            figure.text(0.992, 0.012, machine_of(results[0]), ha="right", size=8, color=SOFT)
            for kind in formats:
                paths.append(folder / f"{name}-{chart}.{kind}")
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(paths[-1], dpi=150, metadata=metadata)
            matplotlib.pyplot.close(figure)
    return paths


def _figures(results: Sequence[Results]) -> Iterator[tuple[str, Any]]:
    series = series_of(results)
    level = results[0].config.get("level", {})
    if any("ttft_ms" in p for each in series for p in each.points):
        yield "throughput", _throughput(series, level)
    if any("ttft_ms_each" in p for each in series for p in each.points):
        yield "ttft", _ttft(series, level)
    if any("occupancy" in p for each in series for p in each.points):
        yield "batch", _batch(series)


def _new(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    line = 0.28 / size[1]  # at the foot, for what was measured and where
    figure.get_layout_engine().set(rect=(0, line, 1, 1 - line), w_pad=0.1, h_pad=0.08)
    return figure, grid


def _throughput(series: Sequence[Series], level: Level) -> Any:
    """Median as a line with the load at each point, p99 as a thin one, and the limit that was set;
    the share of good requests where there was one."""
    has_level = any("good_share" in p for each in series for p in each.points)
    figure, (row,) = _new(1, 3 if has_level else 2, (13 if has_level else 10, 4.4))
    for axes, key, title in (
        (row[0], "ttft_ms", "Time to first token, ms"),
        (row[1], "itl_ms", "Gap between texts (ITL), ms"),
    ):
        medians = [[p[key]["p50"] for p in each.points if key in p] for each in series]
        for number, each in enumerate(series):
            points = [p for p in each.points if key in p]
            x, p99 = [p["output_tok_s"] for p in points], [p[key]["p99"] for p in points]
            axes.plot(x, p99, **_style(number, ls=(0, (1, 1.5)), lw=1.1, ms=3.5, alpha=0.75))
            axes.plot(x, medians[number], **_style(number), label=each.name)
            _mark_loads(axes, points, x, medians, number)
        if limit := level.get(key):
            axes.axhline(limit, **_LIMIT)
        axes.set(title=title, xlabel="output tokens a second")
        axes.set_xlim(left=0)
        axes.margins(y=0.15)
        _logarithmic(axes, "y", [p[key]["p50"] for s in series for p in s.points if key in p])
    if has_level:
        _draw_good(row[2], series)
    _explain(figure, row[0], has_limit=bool({"ttft_ms", "itl_ms"} & level.keys()))
    return figure


_LIMIT: Mapping[str, Any] = {"color": SOFT, "lw": 1.2, "ls": (0, (6, 4)), "zorder": 1}


def _explain(figure: Any, axes: Any, has_limit: bool) -> None:
    """Above all: the colours of targets, the strokes of what is shown of each."""
    from matplotlib.lines import Line2D

    handles, names = axes.get_legend_handles_labels()
    handles += [
        Line2D([], [], color=SOFT, marker="o"),
        Line2D([], [], color=SOFT, marker="o", ls=":", lw=1.1, ms=3.5),
    ]
    names += ["median", "p99"]
    if has_limit:
        handles.append(Line2D([], [], **_LIMIT))
        names.append("service level")
    figure.legend(handles, names, loc="outside upper left", ncols=len(names), columnspacing=1.6)


def _draw_good(axes: Any, series: Sequence[Series]) -> None:
    shares = [[100 * p["good_share"] for p in s.points if "good_share" in p] for s in series]
    for number, each in enumerate(series):
        points = [p for p in each.points if "good_share" in p]
        x = [p["output_tok_s"] for p in points]
        axes.plot(x, shares[number], **_style(number), clip_on=False)
        _mark_loads(axes, points, x, shares, number)
    axes.set(title="Kept the service level, % of requests", xlabel="output tokens a second")
    axes.set_xlim(left=0)
    axes.set_ylim(-8, 108)


def _style(number: int, **more: Any) -> dict[str, Any]:
    of_it = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    return of_it | more


def _mark_loads(
    axes: Any,
    points: Sequence[Point],
    x: Sequence[float],
    lines: Sequence[Sequence[float]],
    number: int,
) -> None:
    """Below the line, which is `lines[number]`; above the one that is the highest of several."""
    highest = max(lines, key=lambda line: sum(line) / max(1, len(line)))
    above = len(lines) > 1 and lines[number] is highest
    place = {"xytext": (-4, 6) if above else (5, -11), "ha": "right" if above else "left"}
    for point, at in zip(points, zip(x, lines[number], strict=True), strict=True):
        axes.annotate(
            load_of(point),
            at,
            textcoords="offset points",
            size=8,
            color=_style(number)["color"] if len(lines) > 1 else STYLE["text.color"],
            **place,
        )


def _ttft(series: Sequence[Series], level: Level) -> Any:
    """A panel a target, a line a load: the share of requests whose first text was there by then."""
    from matplotlib import colormaps

    shown = [s for s in series if any("ttft_ms_each" in p for p in s.points)]
    figure, (row,) = _new(1, len(shown), (5 * len(shown) + 1, 4.2), sharey=True, sharex=True)
    for axes, each in zip(row, shown, strict=True):
        points = [p for p in each.points if "ttft_ms_each" in p]
        for number, point in enumerate(points):
            shade = colormaps["viridis"](0.85 * number / max(1, len(points) - 1))
            axes.ecdf(point["ttft_ms_each"], color=shade, label=load_of(point))
        if limit := level.get("ttft_ms"):
            axes.axvline(limit, **_LIMIT, label="service level")
        axes.set(title=each.name, xlabel="time to first token, ms")
        axes.legend(loc="lower right", handlelength=1.4)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        _logarithmic(axes, "x", [t for p in points for t in p["ttft_ms_each"]])
    row[0].set_ylabel("share of requests")
    return figure


def _batch(series: Sequence[Series]) -> Any:
    """A row a target, a panel a load: the requests that run, those that wait on top."""
    watched = [(s.name, _spread([p for p in s.points if "occupancy" in p])) for s in series]
    shown = [(name, points) for name, points in watched if points][:MAX_ROWS]
    rows, columns = len(shown), max(len(points) for _, points in shown)
    figure, grid = _new(rows, columns, (2.7 * columns + 0.4, 2.5 * rows + 0.7), sharey=True)
    most = 1.0
    for row, (name, points) in zip(grid, shown, strict=True):
        row[0].set_ylabel("requests")
        for axes, point in zip(row, points, strict=False):
            most = max(most, _draw_batch(axes, point["occupancy"][0]))
            axes.set_title(f"{name}, {load_of(point)}", size=9)
        for axes in row[len(points) :]:
            axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    grid[0][0].set_ylim(bottom=0, top=1.06 * most)  # of all: they share it
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def _draw_batch(axes: Any, occupancy: Mapping[str, Any]) -> float:
    """The most requests at once."""
    at, running = occupancy["at_s"], occupancy["running"]
    total = [r + w for r, w in zip(running, occupancy["waiting"], strict=True)]
    axes.fill_between(at, running, step="post", color="#0072b2", alpha=0.85, lw=0, label="running")
    axes.fill_between(at, total, running, step="post", color="#e69f00", lw=0, label="waiting")
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return float(max(total))


def _spread(points: Sequence[Point]) -> Sequence[Point]:
    """At most MAX_COLUMNS: the extremes and what lies evenly between."""
    if len(points) <= MAX_COLUMNS:
        return points
    step = (len(points) - 1) / (MAX_COLUMNS - 1)
    return [points[round(i * step)] for i in range(MAX_COLUMNS)]


def _logarithmic(axes: Any, which: str, values: Iterable[float]) -> None:
    """Where there is something to show so: a server may send all its texts at once."""
    if any(value > 0 for value in values):
        axes.set(**{f"{which}scale": "log"})
        _plain_ticks(getattr(axes, f"{which}axis"))


def _plain_ticks(axis: Any) -> None:
    """20, 50, 100, 200: not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axis.set_minor_formatter(NullFormatter())
