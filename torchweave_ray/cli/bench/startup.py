"""`torchweave bench startup`: options, and the report as JSON lines and medians."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from torchweave_ray.cli.artifact import EngineFile, Model, artifact_of, read_engine_options
from torchweave_ray.cli.bench.options import RESULTS, AsJson, Results, Save, save

if TYPE_CHECKING:
    from torchweave_ray.bench.startup import Line

MEASURES = ("first-token", "ready", "memory")


def startup(
    model: Model = None,
    engine: EngineFile = None,
    measure: Annotated[
        str, typer.Option(help="Some of first-token, ready, memory, with commas.")
    ] = ",".join(MEASURES),
    runs: Annotated[int, typer.Option(help="Times; the median counts.", min=1)] = 3,
    ready_runs: Annotated[int, typer.Option(help="Times that a server starts.", min=1)] = 1,
    staging: Annotated[
        str, typer.Option(help="Of the replicas that are weighed: files or object_store.")
    ] = "files",
    save_it: Save = False,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Measure starts and memory, staging the model first.

    first-token: a process that loads the engine, without Ray. ready: `torchweave serve` to its
    first 200, beside an empty application of two deployments, with and without HAProxy. memory:
    what two replicas on this node have for themselves. --engine is for the first of them.
    """
    from optimizer.recipe import DEFAULT_RECIPE
    from torchweave_ray.bench import startup as bench

    chosen = [name.strip() for name in measure.split(",")]
    for name in chosen:
        if name not in MEASURES:
            raise typer.BadParameter(f"of {', '.join(MEASURES)}", param_hint="--measure")
    options = read_engine_options(engine)
    artifact = artifact_of(model)
    lines: list[Line] = []

    def report(line: Line) -> None:
        print(json.dumps(line), flush=True)
        lines.append(line)

    if "first-token" in chosen:
        for run in range(runs):
            report(bench.first_token(artifact, options, run))
    served = model or os.environ.get("ARTIFACT_MODEL_DIR") or DEFAULT_RECIPE
    if "ready" in chosen:
        _ready(served, ready_runs, report)
    if "memory" in chosen:
        report(bench.replica_memory(served, staging))
    for name, seconds in ({} if as_json else bench.medians(lines)).items():
        print(f"{name}: {seconds:.2f} s", file=sys.stderr)
    if save_it:
        config = {"model": artifact.name, "measure": chosen, "runs": runs, "engine": options}
        save(results, "startup", {**config, "ready_runs": ready_runs}, lines)


def _ready(model: str, runs: int, report: Callable[[Line], None]) -> None:
    """The empty application and the model take turns, so that both see the same machine."""
    from torchweave_ray.bench.startup import APPS, PROFILES, ready

    for run in range(runs):
        for profile in PROFILES:
            for app in APPS:
                report(ready(model, profile, app, run))
