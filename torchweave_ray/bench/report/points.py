"""From single requests to one point of a benchmark: rates and percentiles. Pure arithmetic.

TTFT: from when a request began to its first text; it begins when it is sent, or when a schedule
said that it should be. ITL: gap between two arrivals of text, as a reader
sees it (a server may send several tokens at once). TPOT: (last text - first) / (tokens - 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
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
    due_at: float | None = None
    """When a schedule wanted it sent."""

    @property
    def began_at(self) -> float:
        return self.sent_at if self.due_at is None else self.due_at

    @property
    def ttft_s(self) -> float | None:
        return self.text_times[0] - self.began_at if self.text_times else None

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in pairwise(self.text_times)]

    @property
    def tpot_s(self) -> float | None:
        if not self.text_times or self.output_tokens < 2:
            return None
        return (self.text_times[-1] - self.text_times[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What a request must keep to count as good; milliseconds, None: whatever it takes."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    """Of 95 % of its gaps."""
    tpot_ms: float | None = None
    request_ms: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in asdict(self).values())

    def is_met_by(self, record: RequestRecord) -> bool:
        if record.error is not None:
            return False
        gaps = sorted(record.gaps_s)
        request_s = record.ended_at - record.began_at
        measured = (
            # Who gets the answer in one piece sees its first text at the end.
            (self.ttft_ms, request_s if record.ttft_s is None else record.ttft_s),
            (self.itl_ms, quantile(gaps, 0.95) if gaps else None),
            (self.tpot_ms, record.tpot_s),
            (self.request_ms, request_s),
        )
        return all(
            limit is None or seconds is None or 1e3 * seconds <= limit
            for limit, seconds in measured
        )


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
    """One line of results: one target under one load."""

    target: str
    concurrency: int | None
    """Clients of a closed loop."""
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
    requests_s: float = 0.0
    """Answered, over the whole wall time."""
    peak_concurrency: int = 0
    """Requests under way at once, at most."""
    rate: float | None = None
    """Arrivals a second of an open loop."""
    send_lag_ms: Percentiles | None = None
    """Sent later than due: what the load generator itself, or connecting, took."""
    goodput_s: float | None = None
    """Requests a second that kept the service level."""
    good_share: float | None = None
    client_cpu_ms_per_token: float | None = None
    server_cpu_ms_per_token: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Rounded for reading; what was not measured is left out."""
        return {k: _rounded(v) for k, v in asdict(self).items() if v is not None and v != ()}


def summarize(
    target: str,
    concurrency: int | None,
    records: Sequence[RequestRecord],
    wall_s: float,
    client_cpu_s: float | None = None,
    server_cpu_s: float | None = None,
    rate: float | None = None,
    level: ServiceLevel | None = None,
) -> Point:
    answered = [r for r in records if r.error is None]
    output_tokens = sum(r.output_tokens for r in answered)
    num_good = sum(map(level.is_met_by, records)) if level else None

    def per_token(cpu_s: float | None) -> float | None:
        return None if cpu_s is None or not output_tokens else 1e3 * cpu_s / output_tokens

    def per_second(amount: float) -> float:
        return amount / wall_s if wall_s > 0 else 0.0

    return Point(
        target=target,
        concurrency=concurrency,
        requests=len(records),
        failed=len(records) - len(answered),
        errors=tuple(sorted({r.error for r in records if r.error is not None}))[:3],
        wall_s=wall_s,
        prompt_tokens=sum(r.prompt_tokens for r in answered),
        cached_tokens=sum(r.cached_tokens for r in answered),
        output_tokens=output_tokens,
        output_tok_s=per_second(output_tokens),
        ttft_ms=_percentiles(r.ttft_s for r in answered),
        itl_ms=_percentiles(gap for r in answered for gap in r.gaps_s),
        tpot_ms=_percentiles(r.tpot_s for r in answered),
        request_ms=_percentiles(r.ended_at - r.began_at for r in answered),
        texts_s=per_second(sum(len(r.text_times) for r in answered)),
        requests_s=per_second(len(answered)),
        peak_concurrency=_peak(records),
        rate=rate,
        send_lag_ms=_percentiles(r.sent_at - r.due_at for r in records if r.due_at is not None),
        goodput_s=None if num_good is None else per_second(num_good),
        good_share=None if num_good is None or not records else num_good / len(records),
        client_cpu_ms_per_token=per_token(client_cpu_s),
        server_cpu_ms_per_token=per_token(server_cpu_s),
    )


def _peak(records: Sequence[RequestRecord]) -> int:
    """One that ends when another begins was not beside it."""
    changes = sorted([(r.sent_at, 1) for r in records] + [(r.ended_at, -1) for r in records])
    return max(accumulate(change for _, change in changes), default=0)


def _percentiles(seconds: Iterable[float | None]) -> Percentiles | None:
    ordered = sorted(s for s in seconds if s is not None)
    if not ordered:
        return None
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
