"""The executor of any artifact: ours for the families that we know, else transformers' code.

Loads transformers only for the latter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from torchweave_ray.attention.base import AttentionBackend
from torchweave_ray.errors import ConfigError
from torchweave_ray.models import executors
from torchweave_ray.models.artifact import Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import Executor
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights

logger = logging.getLogger(__name__)


def open_executor(
    directory: Path,
    config: ModelConfig,
    manifest: Manifest,
    placement: Placement,
    attention: AttentionBackend,
    whole: Tensor | None = None,
) -> Executor:
    """As `executors.open_executor`, for foreign models too."""
    if config.foreign is None:
        return executors.open_executor(directory, config, manifest, placement, attention, whole)
    if placement.executor == "native":
        raise ConfigError(
            f"runner.executor is 'native', but {config.architecture} is run by transformers"
        )
    logger.warning(
        "[Model] %s is none of our families: transformers' own code runs it, slower than ours",
        config.architecture,
    )
    tensors = load_weights(directory, config, placement.dtype, placement.device, manifest, whole)
    return executor_of(config, tensors, attention)


def executor_of(
    config: ModelConfig, tensors: Mapping[str, Tensor], attention: AttentionBackend
) -> Executor:
    """Of row-major tensors, for reference."""
    if config.foreign is None:
        return TorchExecutor(build_spec(config), tensors, attention)
    from torchweave_ray.hf.executor import HfExecutor

    return HfExecutor(config, tensors, attention)
