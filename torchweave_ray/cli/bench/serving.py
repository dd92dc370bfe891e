"""`torchweave bench serving`: from its options to the benchmark, and the report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from torchweave_ray.cli.bench import load_options as options
from torchweave_ray.cli.bench.options import (
    DEFAULT_URL,
    RESULTS,
    new_seed,
    positive_numbers,
    positive_rates,
    print_line,
    print_table,
    save,
)

if TYPE_CHECKING:
    from torchweave_ray.bench.load.serving import Measured, ServingConfig
    from torchweave_ray.bench.load.targets import Target


def serving(
    ctx: typer.Context,
    url: options.Urls = None,
    endpoint: options.Endpoint = "completions",
    model: options.ModelName = None,
    api_key: options.ApiKey = None,
    sse: options.Sse = None,
    nobatch: options.Unbatched = None,
    cpu_of: options.CpuOf = None,
    workload: options.Kind = "random",
    input_len: options.InputLen = 100,
    output_len: options.OutputLen = 128,
    prefix_len: options.PrefixLen = 1000,
    prefixes: options.Prefixes = 1,
    turns: options.Turns = 4,
    turn_len: options.TurnLen = 40,
    pause: options.Pause = 0.0,
    tokenizer: options.TokenizerFile = None,
    seed: options.Seed = None,
    concurrency: options.Concurrency = "1,4,16,32",
    rates: options.Rates = None,
    requests: options.Requests = None,
    duration: options.Duration = 30.0,
    rounds: options.Rounds = 1,
    warmup: options.Warmup = None,
    timeout: options.Timeout = 600.0,
    slo_ttft_ms: options.SloTtft = None,
    slo_itl_ms: options.SloItl = None,
    slo_tpot_ms: options.SloTpot = None,
    slo_request_ms: options.SloRequest = None,
    occupancy: options.OccupancyToo = False,
    plots: options.Plots = None,
    save_it: options.Save = False,
    results: options.Results = RESULTS,
    as_json: options.AsJson = False,
) -> None:
    """Measure running servers under closed loops of clients, or open loops of arrivals.

    One JSON line a point on stdout, then a table. Tokens are counted from the server's usage;
    an arrival's latency counts from when it was due, not from when it could be sent.
    """
    run(ctx.params)


def run(given: Mapping[str, Any]) -> None:
    """`given`: the options above, by name."""
    from torchweave_ray.bench.load.targets import run_in_loop
    from torchweave_ray.bench.report.tables import late_sending, unbatched_gain

    config = configured(given)
    try:
        targets, measured = run_in_loop(_measure(config, given))
    except ProcessLookupError as error:
        raise typer.BadParameter(str(error), param_hint="--cpu-of") from error
    points = [m.point for m in measured]
    print_table(points, given["as_json"], [*unbatched_gain(points), *late_sending(points)])
    addresses = {t.name: f"{t.url} {t.dialect.path}" for t in targets}
    values = {**_set_values(dataclasses.asdict(config)), "targets": addresses}
    lines = [m.to_dict() for m in measured]
    if given["save_it"]:
        save(given["results"], "serving", values, lines)
    if given["plots"] is not None:
        _draw(given["plots"], values, lines)
    if any(point.failed for point in points):
        raise typer.Exit(1)


def configured(given: Mapping[str, Any]) -> ServingConfig:
    from torchweave_ray.bench.load.serving import ServingConfig
    from torchweave_ray.bench.load.workloads import Workload
    from torchweave_ray.bench.report.points import ServiceLevel

    shape = ("input_len", "output_len", "prefix_len", "prefixes", "turns", "turn_len", "tokenizer")
    sizes = {name: given[name] for name in shape}
    limits = {name: given[f"slo_{name}"] for name in ("ttft_ms", "itl_ms", "tpot_ms", "request_ms")}
    rates = given["rates"]
    return ServingConfig(
        concurrency=() if rates else positive_numbers(given["concurrency"], "--concurrency"),
        rates=positive_rates(rates, "--rates") if rates else (),
        workload=Workload(given["workload"], pause_s=given["pause"], **sizes),
        requests=given["requests"],
        duration_s=given["duration"],
        level=ServiceLevel(**limits),
        rounds=given["rounds"],
        warmup=given["warmup"],
        seed=new_seed(given["seed"]),
        timeout_s=given["timeout"],
        cpu_of=tuple(given["cpu_of"] or ()),
        occupancy=given["occupancy"] or given["plots"] is not None,
    )


def _draw(folder: Path, config: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    from torchweave_ray.bench.report.charts import draw_charts
    from torchweave_ray.bench.report.results import results_of

    for path in draw_charts([results_of(config, lines)], folder, "serving"):
        print(f"drew {path}", file=sys.stderr)


async def _measure(
    config: ServingConfig, given: Mapping[str, Any]
) -> tuple[list[Target], list[Measured]]:
    from torchweave_ray.bench.load.serving import run_benchmark

    targets = await _targets(given)
    return targets, await run_benchmark(targets, config, print_line)


async def _targets(given: Mapping[str, Any]) -> list[Target]:
    from torchweave_ray.bench.load.targets import ENDPOINTS, native_target, openai_target

    endpoint, key = given["endpoint"], given["api_key"]
    if endpoint not in ENDPOINTS:
        raise typer.BadParameter(f"one of {', '.join(ENDPOINTS)}", param_hint="--endpoint")
    native = {"sse": given["sse"], "nobatch": given["nobatch"]}
    if any(native.values()):
        return [native_target(name, url, key) for name, url in native.items() if url]
    urls = given["url"] or [DEFAULT_URL]
    targets = []
    for text in urls:
        name, url = named_url(text)
        if len(urls) > 1:
            name = name or url.split("://")[-1]
        targets.append(await openai_target(url, endpoint, given["model"], key, name))
    if len({target.name for target in targets}) < len(targets):
        raise typer.BadParameter("two have the same name: give them others", param_hint="--url")
    return targets


def named_url(text: str) -> tuple[str | None, str]:
    """name=http://..., or the address alone."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else (None, text)


def _set_values(values: dict[str, Any]) -> dict[str, Any]:
    """Without what was left open."""
    return {
        name: _set_values(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value not in (None, (), {})
    }
