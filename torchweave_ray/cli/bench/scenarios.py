"""`torchweave bench prefix|interference`: options, and the report as JSON lines and a table."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchweave_ray.cli.bench.options import (
    DEFAULT_URL,
    RESULTS,
    AsJson,
    InputLen,
    Results,
    Save,
    Seed,
    TokenizerFile,
    new_seed,
    print_line,
    print_table,
    save,
)

if TYPE_CHECKING:
    from torchweave_ray.bench.scenarios import InterferenceConfig, Outcome, PrefixConfig

Url = Annotated[str, typer.Option(help="An OpenAI-compatible server.")]
Name = Annotated[str | None, typer.Option("--model", help="Default: its first.")]
Rounds = Annotated[int, typer.Option(help="Times to measure; the median counts.", min=1)]


def prefix(
    url: Url = DEFAULT_URL,
    name: Name = None,
    prefix_len: Annotated[int, typer.Option(help="Words that two requests share.", min=1)] = 1000,
    input_len: InputLen = 64,
    rounds: Rounds = 5,
    tokenizer: TokenizerFile = None,
    seed: Seed = None,
    save_it: Save = False,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Measure what the prefix cache saves: TTFT of a shared prefix, computed and remembered."""
    from torchweave_ray.bench.scenarios import PrefixConfig

    config = PrefixConfig(
        prefix_len, input_len, rounds=rounds, seed=new_seed(seed), tokenizer=tokenizer
    )
    outcome = _measured(url, name, config, as_json)
    if save_it:
        save(results, "prefix", {**dataclasses.asdict(config), "url": url}, outcome)


def interference(
    url: Url = DEFAULT_URL,
    name: Name = None,
    long_len: Annotated[int, typer.Option(help="Words of the long prompt.", min=1)] = 4000,
    input_len: InputLen = 100,
    streams: Annotated[int, typer.Option(help="Requests that run meanwhile.", min=1)] = 4,
    rounds: Rounds = 3,
    tokenizer: TokenizerFile = None,
    seed: Seed = None,
    save_it: Save = False,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Measure what a long prompt costs a short request that comes meanwhile, and the streams.

    Both beside an idle server's: one client, the same prompt length.
    """
    from torchweave_ray.bench.scenarios import InterferenceConfig

    config = InterferenceConfig(
        long_len,
        input_len,
        streams=streams,
        rounds=rounds,
        seed=new_seed(seed),
        tokenizer=tokenizer,
    )
    outcome = _measured(url, name, config, as_json)
    if save_it:
        save(results, "interference", {**dataclasses.asdict(config), "url": url}, outcome)


def _measured(
    url: str, model: str | None, config: PrefixConfig | InterferenceConfig, as_json: bool
) -> list[dict[str, Any]]:
    """Shown here; returns the lines of a results file."""
    from torchweave_ray.bench.load.targets import run_in_loop

    outcome = run_in_loop(_measure(url, model, config))
    for point in outcome.points:
        print_line(point)
    print(json.dumps({name: round(ratio, 4) for name, ratio in outcome.ratios.items()}))
    footer = [f"{name}: {ratio:.3f}" for name, ratio in outcome.ratios.items()]
    print_table(list(outcome.points), as_json, footer)
    return [*(point.to_dict() for point in outcome.points), outcome.ratios]


async def _measure(
    url: str, model: str | None, config: PrefixConfig | InterferenceConfig
) -> Outcome:
    from torchweave_ray.bench.load.targets import openai_target
    from torchweave_ray.bench.scenarios import PrefixConfig, measure_interference, measure_prefix

    target = await openai_target(url, "completions", model)
    if isinstance(config, PrefixConfig):
        return await measure_prefix(target, config)
    return await measure_interference(target, config)
