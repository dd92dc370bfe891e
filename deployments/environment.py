"""The environment variables: over the configuration, which is over the defaults.

Each of them is one row of a table, and one log line says which of the three won. The builder runs
where Ray runs it: of `serve deploy`, that is the cluster's environment, not the shell's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.args import AppArgs, ModelArgs
from torchweave_ray.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    path: tuple[str, ...]
    """Where it goes: keys below `args`, or below every model when the first is "models"."""
    parse: Callable[[str], Any]


VARIABLES = (
    Variable("HF_MODEL", ("models", "recipe"), str),
    Variable("ARTIFACT_MODEL_DIR", ("models", "artifact"), str),
    Variable("ARTIFACT_DIR", ("artifact_dir",), str),
    Variable("ARTIFACT_CACHE_DIR", ("artifact_cache",), str),
    Variable("MAX_BATCH", ("models", "engine", "scheduler", "max_num_seqs"), int),
    Variable("SCHEDULE_TICK_MS", ("models", "engine", "scheduler", "schedule_tick_ms"), float),
    Variable("SPECULATION", ("models", "engine", "speculation", "method"), str),
    Variable("MAX_NEW_TOKENS", ("api", "max_new_tokens"), int),
    Variable("TEMPERATURE", ("api", "temperature"), float),
    Variable("TOP_K", ("api", "top_k"), int),
    Variable("TOP_P", ("api", "top_p"), float),
    Variable("SEED", ("api", "seed"), int),
    Variable("API_KEYS_FILE", ("api", "keys_file"), str),
    Variable("USAGE_LOG_DIR", ("api", "usage_log"), str),
)


def apply_environment(args: AppArgs, environment: Mapping[str, str]) -> AppArgs:
    """`args` with the variables that are set (an empty one is not).

    Raises ConfigError naming the variable whose value cannot be used.
    """
    values = args.model_dump(exclude_unset=True)
    values["models"] = [model.model_dump(exclude_unset=True) for model in args.models]
    for variable in VARIABLES:
        text = environment.get(variable.name, "").strip()
        said = _lookup(values, variable)
        over = "the default" if said is None else f"{said!r} of the configuration"
        if text:
            _apply(values, variable, text)
            _check(values, variable, text)
            logger.info("[Config] %s=%s: environment, over %s", variable.name, text, over)
        else:
            logger.info("[Config] %s: %s", variable.name, over)
    return AppArgs.model_validate(values)


def _lookup(values: dict[str, Any], variable: Variable) -> Any:
    """What the configuration says (of the first model); None: nothing."""
    target: Any = values
    for key in variable.path:
        if isinstance(target, Mapping):
            target = target.get(key)
        if isinstance(target, list):
            target = target[0]
    return target


def _apply(values: dict[str, Any], variable: Variable, text: str) -> None:
    try:
        value = variable.parse(text)
    except ValueError as error:
        raise ConfigError(f"{variable.name}={text}: {error}") from error
    head, *rest = variable.path
    targets = values["models"] if head == "models" else [values]
    path = rest if head == "models" else list(variable.path)
    if path[0] in ("recipe", "artifact"):
        _choose_model(targets, path[0], variable, text)
        return
    for target in targets:
        for key in path[:-1]:
            target = target.setdefault(key, {})
        target[path[-1]] = value


def _choose_model(models: list[dict[str, Any]], key: str, variable: Variable, text: str) -> None:
    """HF_MODEL names the model; ARTIFACT_MODEL_DIR says where it lies and keeps its name."""
    if len(models) > 1:
        raise ConfigError(f"{variable.name} names one model, the configuration {len(models)}")
    (model,) = models
    if key == "recipe":
        model["id"] = text
        model.pop("artifact", None)
    else:
        model["id"] = ModelArgs.model_validate(model).name
        model.pop("recipe", None)
    model[key] = text


def _check(values: dict[str, Any], variable: Variable, text: str) -> None:
    try:
        AppArgs.model_validate(values)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{variable.name}={text}: {error}") from error
