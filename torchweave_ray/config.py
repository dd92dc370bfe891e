"""Engine configuration: frozen, every field documented, unknown keys refused by name.

Each part receives its own piece. What is found at run time (blocks that fit, real context
length) comes back as `RuntimeLimits` and is never written here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, TypeVar

from torchweave_ray.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepCost:
    """Predicted milliseconds of a step: a + b * tokens + c * sum(tokens * context)."""

    a: float
    b: float
    c: float = 0.0

    def predict(self, num_tokens: int, token_context: int) -> float:
        return self.a + self.b * num_tokens + self.c * token_context


@dataclass(frozen=True, slots=True)
class SpillConfig:
    """Blocks of the prefix cache on a disk, in one file a process."""

    path: str
    """A folder for this model alone: files of other models in it are deleted."""
    max_bytes: int = 4 << 30
    """Of each file."""

    def __post_init__(self) -> None:
        _at_least("max_bytes", self.max_bytes, 1)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    block_size: int = 16
    """Tokens a block of KV cache. The native executor takes multiples of 16."""
    kv_memory: int | Literal["auto"] = "auto"
    """Bytes of KV cache; auto: a share of the memory that is free for this replica."""
    kv_memory_share: float | None = None
    """With auto: the share of free memory to take, beside what a step was measured to need; None:
    0.5 of the RAM within the cgroup, 0.9 of a GPU's."""
    replicas_per_node: int = 1
    """With auto: divides the share."""
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    """Share of blocks kept free when admitting, so that running sequences can grow."""
    spill: SpillConfig | None = None
    """Where cached prefixes outlive the process; None: nowhere."""

    def __post_init__(self) -> None:
        if self.spill is not None and not self.enable_prefix_caching:
            raise ConfigError("cache.spill is set, but cache.enable_prefix_caching is false")
        _at_least("block_size", self.block_size, 1)
        _at_least("replicas_per_node", self.replicas_per_node, 1)
        if self.kv_memory != "auto":
            _at_least("kv_memory", self.kv_memory, 1)
        if self.kv_memory_share is not None and not 0.0 < self.kv_memory_share <= 1.0:
            raise ConfigError(f"kv_memory_share must be in (0, 1], got {self.kv_memory_share}")
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark must be in [0, 1), got {self.watermark}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = 32
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step: what is left after one a decode goes to prompts. None: the
    artifact's, if measured on a machine like this, else 512, and `max_num_seqs` at least."""
    max_step_ms: float | None = None
    """Budget of a step in predicted milliseconds; None: from what a lone decode costs, so that a
    prompt makes running streams at most some four times slower. Needs `step_cost`."""
    step_cost: StepCost | None = None
    """Coefficients of the prediction; None: the artifact's, if measured on a machine like this."""
    ageing_tokens_per_step: int = 32
    """A waiting prompt counts as so many tokens shorter for every step it has waited."""
    max_waiting_tokens: int = 262_144
    """Prompt tokens that may wait; beyond it a request is refused with 429."""
    max_waiting_seqs: int = 4096
    """Sequences that may wait; beyond it alike."""
    schedule_tick_ms: float = 0.0
    """Longest wait of an idle scheduler for more arrivals before it starts a step."""

    def __post_init__(self) -> None:
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("ageing_tokens_per_step", self.ageing_tokens_per_step, 1)
        _at_least("max_waiting_tokens", self.max_waiting_tokens, 1)
        _at_least("max_waiting_seqs", self.max_waiting_seqs, 1)
        _at_least("schedule_tick_ms", self.schedule_tick_ms, 0)
        if self.max_num_batched_tokens is not None:
            _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
            if self.max_num_batched_tokens < self.max_num_seqs:
                raise ConfigError("max_num_batched_tokens must be at least max_num_seqs")
        if self.max_step_ms is not None and self.max_step_ms <= 0:
            raise ConfigError(f"max_step_ms must be above 0, got {self.max_step_ms}")

    @property
    def step_tokens(self) -> int:
        """`max_num_batched_tokens` as it holds."""
        return self.max_num_batched_tokens or max(512, self.max_num_seqs)


TUNABLE_LIMITS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_step_ms",
    "max_waiting_tokens",
    "max_waiting_seqs",
)
"""Keys of a SchedulerConfig that may change while the engine runs, within what it began with."""


def tuned_limits(capacity: SchedulerConfig, changes: Mapping[str, Any]) -> SchedulerConfig:
    """`capacity` with these TUNABLE_LIMITS; raises ConfigError for one that exceeds it."""
    for name, value in changes.items():
        if name not in TUNABLE_LIMITS:
            raise ConfigError(f"unknown limit {name}{nearest(name, TUNABLE_LIMITS)}")
        most = getattr(capacity, name)
        if most is not None and (value is None or value > most):
            raise ConfigError(f"{name} = {value} exceeds this replica's capacity of {most}")
    return dataclasses.replace(capacity, **changes)


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the artifact's."""
    kv_dtype: Literal["auto", "model", "int8"] = "auto"
    """auto: what the artifact's recipe asked for, model unless it did; model: what the model
    computes in; int8: codes with a scale for each head and position."""
    executor: Literal["auto", "torch", "native", "triton"] = "auto"
    """native: our own CPU kernels, bfloat16 on x86; triton: our kernels for GPUs (on a CPU only by
    Triton's interpreter, TRITON_INTERPRET=1, which takes seconds a token); torch: plain torch;
    auto: native or triton where they can run, else torch."""
    attention: Literal["auto", "varlen"] = "auto"
    """On a GPU: auto: our own kernels; varlen: torch's `varlen_attn`, which takes blocks of 256."""
    batch_invariant: bool = False
    """On a GPU: a row's bits do not depend on what else is in its step; slower there. The native
    executor's never do."""
    step_depth: Literal["auto", 0, 1] = "auto"
    """Steps that are scheduled before the one before them is done; auto: 1 on a GPU where nobody
    guesses tokens, else 0."""
    decode_graphs: bool = True
    """On a GPU: steps of decodes are captured once and replayed, padded to the next size."""
    threads: int | None = None
    """CPU threads of the model; None: as many as the artifact was found to be fastest with on a
    machine like this, else all cores of this process."""

    def __post_init__(self) -> None:
        if self.threads is not None:
            _at_least("threads", self.threads, 1)


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Guessing tokens and verifying them in the same step. It never changes a text."""

    method: Literal["none", "ngram", "draft"] = "none"
    """ngram: what followed the last tokens when they stood in this sequence before; draft: what a
    smaller model says."""
    model: str | None = None
    """With draft: the smaller model's artifact, of the same tokenizer; a server and the commands
    also take a recipe's name, and stage it."""
    max_draft_tokens: int = 8
    """Most guesses a sequence and step; how many are made follows from how many were right and
    from what a token costs beside the others of the step."""
    min_ngram: int = 2
    """Fewest last tokens that must have stood in the sequence before."""
    max_ngram: int = 4

    def __post_init__(self) -> None:
        _at_least("max_draft_tokens", self.max_draft_tokens, 1)
        _at_least("min_ngram", self.min_ngram, 1)
        _at_least("max_ngram", self.max_ngram, self.min_ngram)
        if self.method == "draft" and not self.model:
            raise ConfigError(
                "speculation.method is 'draft': speculation.model must name the model"
            )
        if self.model and self.method != "draft":
            raise ConfigError(
                f"speculation.model is {self.model!r}, but speculation.method {self.method!r} "
                "takes no model: set it to 'draft'"
            )


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Adapters that requests name as `model:adapter`."""

    source: str | None = None
    """A folder with one folder for each adapter, as PEFT saves it; None: there are none."""
    max_loaded: int = 8
    """Most adapters in memory at a time. The least recently used one makes room; while requests use
    all of them, one that names another waits."""
    max_rank: int = 64
    """Adapters of a larger rank are refused."""

    def __post_init__(self) -> None:
        _at_least("max_loaded", self.max_loaded, 1)
        _at_least("max_rank", self.max_rank, 1)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    max_model_len: int | None = None
    """Longest prompt + output; None: the model's own, or what the KV cache can hold."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    tensor_parallel_size: int = 1
    """Processes that compute a model together, each a slice of every layer, on a GPU of its own."""
    stats_interval_s: float = 10.0
    """Seconds between [Scheduler] log lines while there is work."""

    def __post_init__(self) -> None:
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 2)
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from nested mappings (YAML); raises ConfigError naming key and nearest key."""
        return from_mapping(cls, values, "engine")


def from_mapping(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """A frozen dataclass from a mapping, checked by key and by type. `path` names it in errors."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must be a mapping, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key {path}.{key}{nearest(str(key), known)}")
        kwargs[key] = _coerce(value, hints[key], f"{path}.{key}")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        is_required = f.default is MISSING and f.default_factory is MISSING
        if is_required and f.name not in kwargs:
            raise ConfigError(f"{path}.{f.name} is required")
    return cls(**kwargs)


def _coerce(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_mapping(option, value, path)  # type: ignore[arg-type]
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option in (int, bool, str) and type(value) is option:
            return value
    wanted = " or ".join(_describe(o) for o in options)
    raise ConfigError(f"{path} must be {wanted}, got {value!r}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(repr(a) for a in typing.get_args(option))
    return "null" if option is type(None) else str(getattr(option, "__name__", option))


def _at_least(name: str, value: float, lowest: float) -> None:
    if value < lowest:
        raise ConfigError(f"{name} must be at least {lowest:g}, got {value}")
