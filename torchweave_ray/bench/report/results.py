"""Results files read back, and their points as the series that plots and comparisons show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchweave_ray.bench.origin import describe_origin
from torchweave_ray.errors import ConfigError

Point = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    path: Path
    kind: str
    origin: dict[str, Any]
    config: dict[str, Any]
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One target's points, in the order of their load."""

    name: str
    points: tuple[Point, ...]


def read_results(path: Path) -> Results:
    """Raises ConfigError for what is not a results file with points."""
    try:
        values = json.loads(path.read_text())
        points = tuple(p for p in values["points"] if "target" in p)
        results = Results(path, values["kind"], values["origin"], values["config"], points)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no results file of `torchweave bench`") from error
    if not points:
        raise ConfigError(f"{path} has no points of a load: a file of `bench serving --save` has")
    return results


def results_of(config: dict[str, Any], points: Sequence[Point]) -> Results:
    """What was measured just now, as if it had been saved and read."""
    return Results(Path(), "serving", asdict(describe_origin()), config, tuple(points))


def series_of(results: Sequence[Results]) -> list[Series]:
    """By target; what two files both have is told apart by clients or arrivals, then by commit."""
    named: dict[str, list[Point]] = {}
    for each in results:
        here: dict[str, list[Point]] = {}
        for point in each.points:
            here.setdefault(point["target"], []).append(point)
        for target, points in here.items():
            loop = "arrivals" if "rate" in points[0] else "clients"
            commit = each.origin.get("commit", "unknown")
            names = (target, f"{target}, {loop}", f"{target}, {loop}, {commit}")
            name = next((name for name in names if name not in named), names[-1])
            named.setdefault(name, []).extend(points)
    return [Series(name, tuple(sorted(points, key=_load))) for name, points in named.items()]


def load_of(point: Point) -> str:
    """c=4: clients; 2/s: arrivals."""
    return f"{point['rate']:g}/s" if "rate" in point else f"c={point['concurrency']}"


def work_of(results: Sequence[Results]) -> str:
    """One line: what was asked, where all of it asked the same."""
    works = [each.config.get("workload") for each in results]
    work = works[0]
    if not isinstance(work, dict) or any(each != work for each in works):
        return ""
    talk = f"{work['turns']} turns, " if work.get("kind") == "multi-turn" else ""
    shared = (
        f"{work['prefix_len']} shared words and " if work.get("kind") == "shared-prefix" else ""
    )
    return f"{talk}{shared}{work['input_len']} words in, {work['output_len']} tokens out"


def machine_of(results: Results) -> str:
    """One line: where it was measured."""
    machine, commit = results.origin.get("machine", {}), results.origin.get("commit", "unknown")
    return f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'an unknown CPU')}, {commit}"


def _load(point: Point) -> tuple[float, float]:
    return point.get("rate", 0.0), point.get("concurrency", 0)
