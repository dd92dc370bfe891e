"""Which artifact an offline command means, and the engine's configuration file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torchweave_ray.config import EngineConfig

Model = Annotated[
    str | None,
    typer.Option(
        help="An artifact's folder, or what `torchweave optimize` takes. Default: "
        "ARTIFACT_MODEL_DIR, or SmolLM2-135M-Instruct.",
    ),
]
EngineFile = Annotated[
    Path | None, typer.Option("--engine", help="YAML of the engine's configuration.")
]


def artifact_of(model: str | None) -> Path:
    """The artifact's folder; what is not staged yet is staged, with bars on stderr."""
    from torchweave_ray.models.artifact import MANIFEST

    model = model or os.environ.get("ARTIFACT_MODEL_DIR")
    if model and (folder := Path(model).expanduser()).joinpath(MANIFEST).is_file():
        return folder
    from optimizer.pipeline import optimize
    from optimizer.progress import BarProgress
    from optimizer.recipe import DEFAULT_RECIPE

    with BarProgress() as progress:
        return optimize(model or DEFAULT_RECIPE, None, progress)


def read_engine_config(path: Path | None) -> EngineConfig:
    """Raises ConfigError for what cannot be read, and for unknown keys."""
    from torchweave_ray.config import EngineConfig

    return EngineConfig.from_dict(read_engine_options(path))


def read_engine_options(path: Path | None) -> dict[str, Any]:
    """The file as it is. Raises ConfigError for what cannot be read."""
    import yaml

    from torchweave_ray.errors import ConfigError

    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping")
    return values
