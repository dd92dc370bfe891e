"""Points as a table for people. Knows nothing of how they were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from torchweave_ray.bench.points import Percentiles, Point


def points_table(points: Sequence[Point]) -> Table:
    table = Table(title="p50 / p99 in ms", title_justify="left")
    with_cpu = any(p.server_cpu_ms_per_token is not None for p in points)
    columns = ["target", "c", "requests", "tok/s", "TTFT", "ITL", "TPOT", "request"]
    for name in [*columns, *(["CPU ms/token"] if with_cpu else [])]:
        table.add_column(name, justify="left" if name == "target" else "right", no_wrap=True)
    for p in points:
        requests = f"{p.requests - p.failed}/{p.requests}" if p.failed else str(p.requests)
        cells = [p.target, str(p.concurrency), requests, f"{p.output_tok_s:.1f}"]
        cells += [_cell(x) for x in (p.ttft_ms, p.itl_ms, p.tpot_ms, p.request_ms)]
        if with_cpu:
            cpu = p.server_cpu_ms_per_token
            cells.append("-" if cpu is None else f"{cpu:.2f}")
        table.add_row(*cells)
    return table


def unbatched_gain(points: Sequence[Point]) -> Iterator[str]:
    """Batched against unbatched tokens per second, where both were measured."""
    unbatched = {p.concurrency: p for p in points if p.target == "nobatch"}
    for p in points:
        base = unbatched.get(p.concurrency)
        if p.target == "sse" and base is not None and base.output_tok_s > 0:
            gain = p.output_tok_s / base.output_tok_s
            yield f"c={p.concurrency}: /v1/generate gives {gain:.2f}x of /v1/generate_nobatch"


def _cell(percentiles: Percentiles | None) -> str:
    return "-" if percentiles is None else f"{percentiles.p50:.1f} / {percentiles.p99:.1f}"
