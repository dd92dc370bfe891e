"""Two results of the same work, point by point: what became better, worse, or stayed.

Medians and rates are judged, by more than a tolerance; p99 is shown and not judged: it moves by
itself. Knows nothing of who asks: a person, or a workflow with the last main's file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torchweave_ray.bench.report.results import Point, Results, load_of
from torchweave_ray.errors import ConfigError

Verdict = Literal["better", "worse", "same", "shown"]

RATES = ("output_tok_s", "requests_s", "goodput_s")
TIMES = ("ttft_ms", "itl_ms", "tpot_ms", "request_ms")
NOT_WORK = ("seed", "targets", "cpu_of", "occupancy", "rounds", "timeout_s")
"""Of a configuration: what may differ between two measurements of the same work."""


@dataclass(frozen=True, slots=True)
class Change:
    target: str
    load: str
    metric: str
    before: float
    after: float
    verdict: Verdict

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")

    def to_dict(self) -> dict[str, Any]:
        values = {"before": self.before, "after": self.after, "ratio": round(self.ratio, 3)}
        names = {"target": self.target, "load": self.load, "metric": self.metric}
        return {**names, **values, "verdict": self.verdict}


def compare_results(before: Results, after: Results, tolerance: float) -> list[Change]:
    """Raises ConfigError when they have no point in common."""
    known = {(p["target"], load_of(p)): p for p in before.points}
    changes: list[Change] = []
    for point in after.points:
        if (old := known.get((point["target"], load_of(point)))) is not None:
            changes += _changes(old, point, tolerance)
    if not changes:
        raise ConfigError(f"{before.path} and {after.path} have no target and load in common")
    return changes


def differences(before: Results, after: Results) -> Iterator[str]:
    """What makes the two hard to compare."""
    for name in ("cpu", "cores"):
        pair = [each.origin.get("machine", {}).get(name) for each in (before, after)]
        if pair[0] != pair[1]:
            yield f"{name}: {pair[0]} before, {pair[1]} after"
    for name in sorted(before.config.keys() | after.config.keys()):
        pair = [each.config.get(name) for each in (before, after)]
        if name not in NOT_WORK and pair[0] != pair[1]:
            yield f"config {name}: {pair[0]} before, {pair[1]} after"


def _changes(before: Point, after: Point, tolerance: float) -> Iterator[Change]:
    where = (after["target"], load_of(after))
    for name in RATES:
        if name in before and name in after:
            yield _judged((*where, name), before[name], after[name], tolerance, up_is_better=True)
    for name in TIMES:
        if name in before and name in after:
            for q in ("p50", "p99"):
                values = before[name][q], after[name][q]
                limit = tolerance if q == "p50" else None
                yield _judged((*where, f"{name} {q}"), *values, limit, up_is_better=False)
    if after["failed"] or before["failed"]:
        verdict: Verdict = "worse" if after["failed"] > before["failed"] else "same"
        yield Change(*where, "failed", before["failed"], after["failed"], verdict)


def _judged(
    name: tuple[str, str, str],
    before: float,
    after: float,
    tolerance: float | None,
    up_is_better: bool,
) -> Change:
    verdict: Verdict = "shown"
    if tolerance is not None:
        low, high = before / (1 + tolerance), before * (1 + tolerance)
        verdict = "same"
        if after > high:
            verdict = "better" if up_is_better else "worse"
        elif after < low:
            verdict = "worse" if up_is_better else "better"
    return Change(*name, before, after, verdict)
