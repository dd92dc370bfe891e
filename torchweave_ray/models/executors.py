"""Which executor runs an artifact here: the native one where it can, else torch.

A replica serves with what `open_executor` gives, and the optimizer checks and measures that same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchweave_ray.attention.base import AttentionBackend
from torchweave_ray.errors import ConfigError
from torchweave_ray.kernels.kv_layout import SUB
from torchweave_ray.kernels.library import KernelsUnavailable, Team, load_library
from torchweave_ray.kernels.packing import PackedLinear
from torchweave_ray.models.artifact import Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.emitter import CannotLower
from torchweave_ray.models.native_executor import NativeExecutor
from torchweave_ray.models.ops import Ops
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import Executor
from torchweave_ray.models.tensors import PACKED, QUANTIZED
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_products, load_weights, map_packed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model is to run."""

    dtype: torch.dtype
    device: torch.device
    num_threads: int
    """Of the native executor; torch's are set by whoever owns the process."""
    executor: Literal["auto", "torch", "native", "triton"] = "auto"
    block_size: int = SUB
    """Of the KV cache."""
    team: Team | None = None
    """Threads of another model's executor, which never runs at the same time; None: its own."""
    ops: Ops | None = None
    """Arithmetic of the torch executor; None: plain torch's."""


def open_executor(
    directory: Path,
    config: ModelConfig,
    manifest: Manifest,
    placement: Placement,
    attention: AttentionBackend,
    whole: Tensor | None = None,
) -> NativeExecutor | TorchExecutor:
    """Load the weights of an artifact's folder into an executor. `whole`: as of `load_weights`.

    Raises ArtifactError for weights that cannot be read, ConfigError when the native executor is
    asked for and cannot be had.
    """
    spec = build_spec(config)
    dtype, device = placement.dtype, placement.device
    plain: dict[str, Tensor] | None = None
    if placement.executor == "native" and device.type != "cpu":
        raise ConfigError(f"runner.executor is 'native', which runs on CPUs, not on {device}")
    if placement.executor in ("auto", "native") and device.type == "cpu":
        try:
            library = load_library()
            if placement.block_size % SUB != 0:
                raise CannotLower(
                    f"cache.block_size {placement.block_size} is no multiple of {SUB}"
                )
            stored: Mapping[str, Tensor | PackedLinear]
            if manifest.layout in (PACKED, QUANTIZED) and dtype == torch.bfloat16:
                stored = map_packed(directory, config, manifest, whole)
            else:
                plain = load_weights(directory, config, dtype, device, manifest, whole)
                stored = plain
            return NativeExecutor(spec, stored, library, placement.num_threads, placement.team)
        except (KernelsUnavailable, CannotLower) as error:
            if placement.executor == "native":
                raise ConfigError(f"runner.executor is 'native', but {error}") from error
            logger.warning("the torch executor runs this model: %s", error)
    if placement.ops is not None:
        codes = load_products(directory, config, dtype, device, manifest, whole)
        return TorchExecutor(spec, codes, attention, placement.ops)
    if plain is None:
        plain = load_weights(directory, config, dtype, device, manifest, whole)
    return TorchExecutor(spec, plain, attention)


def executor_name(executor: Executor) -> str:
    """For people and fingerprints: "torch", "native avx512"."""
    return f"native {executor.isa}" if isinstance(executor, NativeExecutor) else executor.name
