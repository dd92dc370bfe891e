"""From single requests to one point of a benchmark: rates and percentiles. Pure arithmetic.

TTFT: from sending a request to its first text. ITL: gap between two arrivals of text, as a reader
sees it (a server may send several tokens at once). TPOT: (last text - first) / (tokens - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as measured; times in seconds of one clock."""

    sent_at: float
    ended_at: float
    text_times: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Point:
    """One line of results: one target at one concurrency."""

    target: str
    concurrency: int
    requests: int
    failed: int
    errors: tuple[str, ...]
    """The distinct reasons, at most three."""
    wall_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tok_s: float
    """Output tokens over the whole wall time, prompt time included."""
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    tpot_ms: Percentiles | None
    request_ms: Percentiles | None
    texts_s: float = 0.0
    """Arrivals of text a second: fewer than tokens where a server merges some."""
    client_cpu_ms_per_token: float | None = None
    server_cpu_ms_per_token: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Rounded for reading; what was not measured is left out."""
        return {k: _rounded(v) for k, v in asdict(self).items() if v is not None and v != ()}


def summarize(
    target: str,
    concurrency: int,
    records: Sequence[RequestRecord],
    wall_s: float,
    client_cpu_s: float | None = None,
    server_cpu_s: float | None = None,
) -> Point:
    good = [r for r in records if r.error is None]
    timed = [r for r in good if r.text_times]
    output_tokens = sum(r.output_tokens for r in good)

    def per_token(cpu_s: float | None) -> float | None:
        return None if cpu_s is None or not output_tokens else 1e3 * cpu_s / output_tokens

    return Point(
        target=target,
        concurrency=concurrency,
        requests=len(records),
        failed=len(records) - len(good),
        errors=tuple(sorted({r.error for r in records if r.error is not None}))[:3],
        wall_s=wall_s,
        prompt_tokens=sum(r.prompt_tokens for r in good),
        cached_tokens=sum(r.cached_tokens for r in good),
        output_tokens=output_tokens,
        output_tok_s=output_tokens / wall_s if wall_s > 0 else 0.0,
        ttft_ms=_percentiles([r.text_times[0] - r.sent_at for r in timed]),
        itl_ms=_percentiles([b - a for r in timed for a, b in pairwise(r.text_times)]),
        tpot_ms=_percentiles(
            [
                (r.text_times[-1] - r.text_times[0]) / (r.output_tokens - 1)
                for r in timed
                if r.output_tokens > 1
            ]
        ),
        request_ms=_percentiles([r.ended_at - r.sent_at for r in good]),
        texts_s=sum(len(r.text_times) for r in good) / wall_s if wall_s > 0 else 0.0,
        client_cpu_ms_per_token=per_token(client_cpu_s),
        server_cpu_ms_per_token=per_token(server_cpu_s),
    )


def _percentiles(seconds: Sequence[float]) -> Percentiles | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    mean = sum(ordered) / len(ordered)
    return Percentiles(1e3 * mean, *(1e3 * quantile(ordered, q) for q in (0.5, 0.9, 0.95, 0.99)))


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest ranks of a sorted, non-empty sequence."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value
