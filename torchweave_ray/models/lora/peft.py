"""LoRA adapters as PEFT saves them: W + scale * alpha / r * (B @ A).

What an adapter holds or asks for beyond that is refused by name, and no pickle is ever read.
Layout: peft/tuners/lora/config.py, `LoraConfig`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchweave_ray.errors import ArtifactError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN = re.compile(r"[\w.]+", re.ASCII)
_ROWS = 1024
_CONFIG_LIMIT = 1 << 20
# Keys that say nothing about the sum, or say how A and B were made.
_NEUTRAL = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "megatron_config", "megatron_core", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    )
)
_READ = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "bias", "init_lora_weights"),
    )
)
# Other ways to begin change the base's weights too (PiSSA, OLoRA, CorDA, LoftQ).
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class _Pair:
    a: str
    b: str
    """Names in the file."""
    rank: int
    scale: float
    """alpha / r, or alpha / sqrt(r)."""


class LoraAdapter:
    """One adapter's folder, checked; its tensors are read when they are merged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _read_config(folder / ADAPTER_CONFIG)
        self._pairs = self._read_pairs()
        self._check_targets()

    @property
    def targets(self) -> Mapping[str, tuple[int, int]]:
        """Shape of each weight that it changes, by Hugging Face name."""
        return self._shapes

    @property
    def rank(self) -> int:
        """The largest of its modules'."""
        return max(pair.rank for pair in self._pairs.values())

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, k] and B [n, r] of a target in float64; B has the scale in it."""
        pair = self._pairs[name]
        with safe_open(self._folder / ADAPTER_WEIGHTS, framework="pt", device="cpu") as file:
            a, b = file.get_tensor(pair.a).double(), file.get_tensor(pair.b).double()
        return a, pair.scale * b

    def add(self, name: str, weight: Tensor, scale: float) -> None:
        """Add the delta of `name`, times `scale`, to `weight` [n, k], in place, in float64, one
        block of rows at a time."""
        a, b = self.matrices(name)
        for start in range(0, weight.shape[0], _ROWS):
            rows = weight[start : start + _ROWS]
            rows.copy_(rows.double() + scale * (b[start : start + _ROWS] @ a))

    def _read_pairs(self) -> dict[str, _Pair]:
        path = self._folder / ADAPTER_WEIGHTS
        sides: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    found = _TENSOR.fullmatch(key)
                    if found is None:
                        raise ArtifactError(
                            f"{path}: tensor {key} is not one of a LoRA adapter that we merge"
                        )
                    shape = tuple(file.get_slice(key).get_shape())
                    sides.setdefault(found["module"], {})[found["side"]] = (key, shape)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} is missing") from error
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        if not sides:
            raise ArtifactError(f"{path} holds no tensors")
        self._shapes: dict[str, tuple[int, int]] = {}
        return {f"{module}.weight": self._pair(module, both) for module, both in sides.items()}

    def _pair(self, module: str, both: Mapping[str, tuple[str, tuple[int, ...]]]) -> _Pair:
        if len(both) != 2:
            raise ArtifactError(
                f"{self._folder}: module {module} has only lora_{next(iter(both))} of the two"
            )
        (a, a_shape), (b, b_shape) = both["A"], both["B"]
        rank = _number(self._config, "rank_pattern", "r", module)
        if len(a_shape) != 2 or len(b_shape) != 2 or not a_shape[0] == b_shape[1] == rank:
            raise ArtifactError(
                f"{self._folder}: module {module} has lora_A {list(a_shape)} and lora_B "
                f"{list(b_shape)}, {ADAPTER_CONFIG} says rank {rank:g}"
            )
        alpha = _number(self._config, "alpha_pattern", "lora_alpha", module)
        self._shapes[f"{module}.weight"] = (b_shape[0], a_shape[1])
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return _Pair(a, b, int(rank), scale)

    def _check_targets(self) -> None:
        """Names in `target_modules`, that is: a pattern or "all-linear" promises nothing."""
        targets = self._config.get("target_modules")
        if not isinstance(targets, list):
            return
        modules = [name.removesuffix(".weight") for name in self._pairs]
        for module in modules:
            if not any(_ends_with(module, str(target)) for target in targets):
                raise ArtifactError(
                    f"{self._folder}: module {module} is none of target_modules {targets}"
                )
        for target in targets:
            if not any(_ends_with(module, str(target)) for module in modules):
                raise ArtifactError(
                    f"{self._folder}: target module {target!r} has no tensors in {ADAPTER_WEIGHTS}"
                )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _CONFIG_LIMIT:
            raise ArtifactError(f"{path} is larger than any adapter's configuration")
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is missing: an adapter is a folder as PEFT saves it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} must hold a JSON object")
    if config.get("peft_type") != "LORA":
        raise ArtifactError(f"{path}: peft_type {config.get('peft_type')!r} is not 'LORA'")
    for key, value in config.items():
        if value and key not in _NEUTRAL | _READ:
            raise ArtifactError(f"{path}: {key} = {value!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ArtifactError(f"{path}: bias = {config['bias']!r} is not supported")
    beginning = config.get("init_lora_weights")
    if not any(beginning is known or beginning == known for known in _BEGINNINGS):
        raise ArtifactError(
            f"{path}: init_lora_weights = {beginning!r} is not supported: it changes the base too"
        )
    return config


def _number(config: Mapping[str, Any], pattern: str, key: str, module: str) -> float:
    """`key`, or what the first entry of `pattern` that fits this module says."""
    value: Any = config.get(key)
    said = key
    entries = config.get(pattern) or {}
    if not isinstance(entries, dict):
        raise ArtifactError(f"{ADAPTER_CONFIG}: {pattern} must be a mapping")
    for name, other in entries.items():
        if not _PLAIN.fullmatch(name):
            raise ArtifactError(f"{ADAPTER_CONFIG}: {pattern} {name!r} is not a module's name")
        if _ends_with(module, name):
            value, said = other, f"{pattern} {name}"
            break
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ArtifactError(f"{ADAPTER_CONFIG}: {said} must be a number above 0, got {value!r}")
    return float(value)


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
