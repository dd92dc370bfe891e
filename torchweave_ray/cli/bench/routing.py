"""`torchweave bench routing`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Annotated

import typer

from torchweave_ray.cli.artifact import Model, artifact_of
from torchweave_ray.cli.bench.options import (
    RESULTS,
    AsJson,
    Results,
    Save,
    Seed,
    new_seed,
    print_table,
    save,
)


def routing(
    model: Model = None,
    replicas: Annotated[int, typer.Option(help="Replicas, all on this machine.", min=2)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of a replica.", min=1)] = 1,
    conversations: Annotated[int, typer.Option(help="Held at once.", min=1)] = 12,
    turns: Annotated[int, typer.Option(help="Of a conversation.", min=2)] = 5,
    first_len: Annotated[int, typer.Option(help="Words of a first turn.", min=1)] = 150,
    turn_len: Annotated[int, typer.Option(help="Words that a later turn adds.", min=1)] = 40,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 16,
    pause: Annotated[float, typer.Option(help="Mean seconds between two turns.", min=0.01)] = 1.0,
    rounds: Annotated[int, typer.Option(help="New servers and words each.", min=1)] = 3,
    seed: Seed = None,
    save_it: Save = False,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Measure conversations over several replicas, with our router and with Ray Serve's own.

    Starts a server for each in every round. Hit rate: share of the later turns' prompt tokens found
    in a cache; balance: CPU time of the busiest replica over their mean.
    """
    from optimizer.recipe import DEFAULT_RECIPE
    from torchweave_ray.bench.conversations import ConversationsConfig, measure_routers

    config = ConversationsConfig(
        replicas=replicas,
        threads=threads,
        conversations=conversations,
        turns=turns,
        first_len=first_len,
        turn_len=turn_len,
        output_len=output_len,
        pause_s=pause,
        rounds=rounds,
        seed=new_seed(seed),
    )
    artifact = artifact_of(model)  # staged now, not while a server starts
    served = model or os.environ.get("ARTIFACT_MODEL_DIR") or DEFAULT_RECIPE
    measured = []
    for router in measure_routers(served, config):
        measured.append(router)
        print(json.dumps(router.to_dict()), flush=True)
    footer = [
        f"{m.router}: hit rate {m.hit_rate:.2f}, busiest replica {m.balance:.2f} x mean CPU"
        for m in measured
    ]
    print_table([point for m in measured for point in (m.first, m.later)], as_json, footer)
    if save_it:
        values = {"model": artifact.name, **dataclasses.asdict(config)}
        save(results, "routing", values, [m.to_dict() for m in measured])
