"""`torchweave bench throughput`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import dataclasses

from torchweave_ray.cli.artifact import EngineFile, Model, artifact_of, read_engine_config
from torchweave_ray.cli.bench.options import (
    RESULTS,
    AsJson,
    Concurrency,
    InputLen,
    OutputLen,
    Requests,
    Results,
    Save,
    Seed,
    new_seed,
    positive_numbers,
    print_line,
    print_table,
    save,
)


def throughput(
    model: Model = None,
    engine: EngineFile = None,
    concurrency: Concurrency = "1,4,16,32",
    requests: Requests = None,
    input_len: InputLen = 100,
    output_len: OutputLen = 128,
    seed: Seed = None,
    save_it: Save = False,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Measure the engine in this process: no HTTP, no Ray.

    The same work as `bench serving`, so the difference is the price of serving.
    """
    from torchweave_ray.bench.throughput import ThroughputConfig, run_throughput

    config = ThroughputConfig(
        concurrency=positive_numbers(concurrency, "--concurrency"),
        requests=requests,
        input_len=input_len,
        output_len=output_len,
        seed=new_seed(seed),
    )
    engine_config = read_engine_config(engine)
    loaded, points = run_throughput(artifact_of(model), engine_config, config, print_line)
    print_table(points, as_json)
    if save_it:
        info = loaded.info
        about = {"model": info.id, "executor": info.executor, "dtype": info.dtype}
        values = {
            **dataclasses.asdict(config),
            **about,
            "engine": dataclasses.asdict(engine_config),
        }
        save(results, "throughput", values, [p.to_dict() for p in points])
