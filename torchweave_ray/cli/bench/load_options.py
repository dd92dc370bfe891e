"""The options of `torchweave bench serving`: whom to ask, what, how often, and what is good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchweave_ray.cli.completion import one_of

WHO, WHAT, WHEN, GOOD, REPORT = "Servers", "Work", "Load", "Service level", "Report"

Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        help="An OpenAI-compatible server; several take turns. name=http://... names its line. "
        "Default: http://127.0.0.1:8000.",
        rich_help_panel=WHO,
    ),
]
Endpoint = Annotated[
    str,
    typer.Option(
        help="completions or chat.",
        autocompletion=one_of("completions", "chat"),
        rich_help_panel=WHO,
    ),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Default: a server's first.", rich_help_panel=WHO)
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="TORCHWEAVE_API_KEY", help="Sent as a bearer token.", rich_help_panel=WHO),
]
Sse = Annotated[
    str | None,
    typer.Option(help="Measure this /v1/generate address instead.", rich_help_panel=WHO),
]
Unbatched = Annotated[
    str | None,
    typer.Option(help="Measure this /v1/generate_nobatch address too.", rich_help_panel=WHO),
]
CpuOf = Annotated[
    list[int] | None,
    typer.Option(help="Process id of the server: report its tree's CPU.", rich_help_panel=WHO),
]

Kind = Annotated[
    str,
    typer.Option(
        help="random, shared-prefix or multi-turn.",
        autocompletion=one_of("random", "shared-prefix", "multi-turn"),
        rich_help_panel=WHAT,
    ),
]
InputLen = Annotated[
    int,
    typer.Option(
        help="Words of a prompt (beside its prefix; of a first turn); tokens with --tokenizer.",
        min=1,
        rich_help_panel=WHAT,
    ),
]
OutputLen = Annotated[
    int,
    typer.Option(help="Tokens to generate; the end token is ignored.", min=1, rich_help_panel=WHAT),
]
PrefixLen = Annotated[
    int, typer.Option(help="Words that requests share.", min=1, rich_help_panel=WHAT)
]
Prefixes = Annotated[
    int, typer.Option(help="Different prefixes; they take turns.", min=1, rich_help_panel=WHAT)
]
Turns = Annotated[int, typer.Option(help="Of a conversation.", min=1, rich_help_panel=WHAT)]
TurnLen = Annotated[
    int, typer.Option(help="Words that a later turn adds.", min=1, rich_help_panel=WHAT)
]
Pause = Annotated[
    float, typer.Option(help="Mean seconds between turns.", min=0.0, rich_help_panel=WHAT)
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(exists=True, help="tokenizer.json: send exact token ids.", rich_help_panel=WHAT),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Of words and arrivals. Default: new each time, for servers remember prefixes.",
        rich_help_panel=WHAT,
    ),
]

Concurrency = Annotated[
    str,
    typer.Option(help="Closed loop: clients at once; several: 1,4,16.", rich_help_panel=WHEN),
]
Rates = Annotated[
    str | None,
    typer.Option(
        "--rates",
        "--rate",
        help="Open loop instead: Poisson arrivals a second (of conversations with multi-turn); "
        "several: 1,2,4,8.",
        rich_help_panel=WHEN,
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests",
        "--iters",
        help="A point and round (conversations with multi-turn). Default: 3 a client, >= 8; "
        "open loop: --duration.",
        min=1,
        rich_help_panel=WHEN,
    ),
]
Duration = Annotated[
    float, typer.Option(help="Seconds of an open loop's arrivals.", min=0.1, rich_help_panel=WHEN)
]
Rounds = Annotated[
    int,
    typer.Option(
        help="Measure all servers so often, in turns; they count together.",
        min=1,
        rich_help_panel=WHEN,
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option(
        help="Short requests first. Default: one a client or prefix.", min=0, rich_help_panel=WHEN
    ),
]
Timeout = Annotated[
    float, typer.Option(help="Seconds a request may take.", min=0.1, rich_help_panel=WHEN)
]

SloTtft = Annotated[
    float | None, typer.Option(help="Most TTFT of a good request.", rich_help_panel=GOOD)
]
SloItl = Annotated[
    float | None, typer.Option(help="Most ITL, of 95 % of its gaps.", rich_help_panel=GOOD)
]
SloTpot = Annotated[float | None, typer.Option(help="Most TPOT.", rich_help_panel=GOOD)]
SloRequest = Annotated[
    float | None, typer.Option(help="Most time of the whole request.", rich_help_panel=GOOD)
]

OccupancyToo = Annotated[
    bool,
    typer.Option(
        "--occupancy",
        help="Ask the server's /metrics for its batch, twice a second; --plots does.",
        rich_help_panel=REPORT,
    ),
]
Plots = Annotated[
    Path | None,
    typer.Option(help="Folder for PNG and SVG of it, as of `bench plot`.", rich_help_panel=REPORT),
]
Save = Annotated[
    bool,
    typer.Option("--save", help="Write a results file with its origin.", rich_help_panel=REPORT),
]
Results = Annotated[Path, typer.Option(help="Folder of the results file.", rich_help_panel=REPORT)]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="The JSON lines alone, without the table.", rich_help_panel=REPORT),
]
