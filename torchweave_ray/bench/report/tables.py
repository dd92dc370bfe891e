"""Points as a table for people. Knows nothing of how they were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from torchweave_ray.bench.report.points import Percentiles, Point


def points_table(points: Sequence[Point]) -> Table:
    """Fits 80 columns: a pipe has no more."""
    table = Table(title="p50/p99 in ms", title_justify="left", box=None, padding=(0, 1, 0, 0))
    with_cpu = any(p.server_cpu_ms_per_token is not None for p in points)
    with_level = any(p.good_share is not None for p in points)
    more = [*(["CPU/token"] if with_cpu else []), *(["good/s"] if with_level else [])]
    for name in ["target", "load", "tok/s", "TTFT", "ITL", "TPOT", "request", *more]:
        table.add_column(name, justify="left" if name == "target" else "right", no_wrap=True)
    for p in points:
        cells = [p.target, load_of(p), f"{p.output_tok_s:.1f}"]
        cells += [_cell(x) for x in (p.ttft_ms, p.itl_ms, p.tpot_ms, p.request_ms)]
        if with_cpu:
            cpu = p.server_cpu_ms_per_token
            cells.append("-" if cpu is None else f"{cpu:.2f}")
        if with_level:
            cells.append("-" if p.goodput_s is None else f"{p.goodput_s:.2f}")
        table.add_row(*cells)
    return table


def load_of(point: Point) -> str:
    """c=4: clients; 2/s: arrivals."""
    return f"c={point.concurrency}" if point.rate is None else f"{point.rate:g}/s"


def failures(points: Sequence[Point]) -> Iterator[str]:
    for p in points:
        if p.failed:
            reasons = "; ".join(p.errors)
            yield f"{p.target} {load_of(p)}: {p.failed} of {p.requests} failed: {reasons}"


def late_sending(points: Sequence[Point]) -> Iterator[str]:
    """Where the load generator, not the server, made requests late."""
    for p in points:
        if p.send_lag_ms and p.ttft_ms and p.send_lag_ms.p99 > max(5.0, 0.1 * p.ttft_ms.p50):
            yield (
                f"{p.target} {load_of(p)}: sent up to {p.send_lag_ms.p99:.0f} ms late (p99), which "
                "its latencies include: this machine is too busy to measure such a rate"
            )


def unbatched_gain(points: Sequence[Point]) -> Iterator[str]:
    """Batched against unbatched tokens per second, where both were measured."""
    unbatched = {load_of(p): p for p in points if p.target == "nobatch"}
    for p in points:
        base = unbatched.get(load_of(p))
        if p.target == "sse" and base is not None and base.output_tok_s > 0:
            gain = p.output_tok_s / base.output_tok_s
            yield f"{load_of(p)}: /v1/generate gives {gain:.2f}x of /v1/generate_nobatch"


def _cell(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return "-"
    return f"{_short(percentiles.p50)}/{_short(percentiles.p99)}"


def _short(milliseconds: float) -> str:
    if milliseconds >= 1e4:
        return f"{milliseconds / 1e3:.1f}s"
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"
