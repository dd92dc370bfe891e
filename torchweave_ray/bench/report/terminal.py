"""The same charts in the terminal, drawn by plotext (the extra `bench`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from torchweave_ray.bench.report.results import Results, Series, load_of, series_of
from torchweave_ray.errors import ConfigError

HEIGHT = 16
MARKERS = "•xo+*#"


def terminal_charts(results: Sequence[Results], colour: bool, width: int = 0) -> Iterator[str]:
    """One text a chart. Raises ConfigError where plotext is not installed."""
    try:
        import plotext
    except ImportError as error:
        message = "plots in the terminal need plotext: pip install 'torchweave-ray[bench]'"
        raise ConfigError(message) from error
    series = series_of(results)
    for title, x_label, lines in _charts(series):
        figure = plotext.figure
        figure.clear()
        figure.theme("simple")
        figure.plot_size(width or min(100, shutil.get_terminal_size().columns), HEIGHT)
        figure.title(title)
        figure.label(x_label, "x")
        for number, (_, x, y) in enumerate(lines):
            figure.draw(figure.signal(x, y, marker=_mark(number)).lines())
        # A legend inside would lie on the lines.
        legend = "   ".join(f"{_mark(number)} {name}" for number, (name, _, _) in enumerate(lines))
        text = f"{figure.build()}\n{legend}\n"
        figure.clear()
        yield text if colour else plotext.uncolorize(text)


def _mark(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


_Line = tuple[str, list[float], list[float]]


def _charts(series: Sequence[Series]) -> Iterator[tuple[str, str, list[_Line]]]:
    yield from _drawn("TTFT p50, ms", "output tokens a second", _throughput(series, "ttft_ms"))
    yield from _drawn("ITL p50, ms", "output tokens a second", _throughput(series, "itl_ms"))
    yield from _drawn("TTFT: % of requests", "ms", _ttft(series))
    yield from _drawn("Requests running", "s", _batch(series))


def _drawn(title: str, x_label: str, lines: list[_Line]) -> Iterator[tuple[str, str, list[_Line]]]:
    if lines:
        yield title, x_label, lines


def _throughput(series: Sequence[Series], key: str) -> list[_Line]:
    found = []
    for each in series:
        points = [p for p in each.points if key in p]
        if points:
            y = [p[key]["p50"] for p in points]
            found.append((each.name, [p["output_tok_s"] for p in points], y))
    return found


def _ttft(series: Sequence[Series]) -> list[_Line]:
    """Of each target the least load and the most."""
    found = []
    for each in series:
        points = [p for p in each.points if "ttft_ms_each" in p]
        for point in points[:1] + points[1:][-1:]:
            ordered = sorted(point["ttft_ms_each"])
            share = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
            found.append((f"{each.name} {load_of(point)}", ordered, share))
    return found


def _batch(series: Sequence[Series]) -> list[_Line]:
    found: list[_Line] = []
    for each in series:
        points: list[dict[str, Any]] = [p for p in each.points if "occupancy" in p]
        for point in points[-1:]:
            occupancy = point["occupancy"][0]
            name = f"{each.name} {load_of(point)}"
            found.append((name, occupancy["at_s"], occupancy["running"]))
    return found
