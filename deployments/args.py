"""The typed arguments of the application: what `serve_config.yaml` may say under `args`.

Structure and capacity only; limits that change in place are `user_config`. An unknown key is an
error that names the nearest one. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.config import TUNABLE_LIMITS, EngineConfig, SchedulerConfig, from_mapping
from torchweave_ray.errors import ConfigError, nearest

DEFAULT_RECIPE = "smollm2-135m"
LONGEST_STREAM_S = 600.0


class StrictModel(BaseModel):
    """Refuses unknown keys with a hint, which pydantic's own message lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    hint = nearest(str(key), cls.model_fields)
                    raise ConfigError(f"unknown key {key!r} in {cls._where()}{hint}")
        return values

    @classmethod
    def _where(cls) -> str:
        return cls.__name__.removesuffix("Args").lower() + " args"


class ModelArgs(StrictModel):
    """One model and the replicas that serve it."""

    id: str = Field(default="", max_length=200, pattern=r"^[\w./:@-]*$")
    """What requests call it; empty: the last part of recipe or artifact."""
    recipe: str | None = None
    """A recipe's name or path, a folder, a GGUF file, a Hugging Face id, or pypi:..."""
    artifact: str | None = None
    """An artifact that is staged already, in place of a recipe."""
    num_replicas: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for every replica where the cluster has any."""
    num_gpus: float | None = Field(default=None, gt=0)
    """GPUs a replica; None: 1, or an equal share where there are fewer GPUs than replicas."""
    num_cpus: float | None = Field(default=None, gt=0)
    """CPUs that Ray sets aside for a replica; None: its share of a node."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a replica; None: the node's cores divided by its replicas."""
    router: Literal["prefix", "default"] = "prefix"
    """prefix: the replica with the least to compute for a request; default: Ray Serve's own."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """An `EngineConfig` as nested mappings."""

    @field_validator("engine")
    @classmethod
    def _engine(cls, values: dict[str, Any]) -> dict[str, Any]:
        runner = EngineConfig.from_dict(values).runner
        for key in ("device", "threads"):
            if key in values.get("runner", {}):
                raise ConfigError(
                    f"set {key} of the model, not engine.runner.{key} = {getattr(runner, key)!r}"
                )
        return values

    @model_validator(mode="after")
    def _one_source(self) -> ModelArgs:
        if self.recipe and self.artifact:
            raise ConfigError(f"model {self.name!r}: give a recipe or an artifact, not both")
        return self

    @property
    def name(self) -> str:
        source = self.artifact or self.recipe or DEFAULT_RECIPE
        return self.id or source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".yaml")


def limits_of(model: ModelArgs, user_config: Mapping[str, Any]) -> dict[str, Any]:
    """What `user_config` changes; raises ConfigError for what cannot be, whatever the machine."""
    for name in user_config:
        if name not in TUNABLE_LIMITS:
            raise ConfigError(f"user_config: unknown limit {name}{nearest(name, TUNABLE_LIMITS)}")
    capacity = EngineConfig.from_dict(model.engine).scheduler
    values = {**model.engine.get("scheduler", {}), **user_config}
    changed = from_mapping(SchedulerConfig, values, "user_config")  # types, and how they fit
    for name in user_config:
        most, value = getattr(capacity, name), getattr(changed, name)
        if most is not None and (value is None or value > most):
            raise ConfigError(f"user_config: {name} = {value} exceeds the capacity of {most}")
    return dict(user_config)


class IngressArgs(StrictModel):
    num_replicas: int = Field(default=1, ge=1)
    """Keep it fixed: every change reloads HAProxy."""
    num_cpus: float = Field(default=0.1, ge=0)
    bus: bool = True
    """False: tokens travel as items of the handle call."""


class AppArgs(StrictModel):
    models: tuple[ModelArgs, ...] = Field(default=(ModelArgs(recipe=DEFAULT_RECIPE),), min_length=1)
    artifact_dir: str | None = None
    """Where staged artifacts are kept; None: the optimizer's own place."""
    ingress: IngressArgs = IngressArgs()
    longest_stream_s: float = Field(default=LONGEST_STREAM_S, gt=0)
    """How long replicas that are told to stop finish their streams; then those are moved to
    another replica, or end."""
    api: dict[str, Any] = Field(default_factory=dict)
    """An `ApiSettings` as a mapping: defaults of requests and limits of an HTTP call."""

    @field_validator("api")
    @classmethod
    def _api(cls, values: dict[str, Any]) -> dict[str, Any]:
        from_mapping(ApiSettings, values, "api")
        return values

    @model_validator(mode="after")
    def _distinct(self) -> AppArgs:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two models have the id {name!r}")
        return self

    @property
    def api_settings(self) -> ApiSettings:
        return from_mapping(ApiSettings, self.api, "api")
