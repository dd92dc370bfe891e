"""Which attention and which arithmetic a device gets: our Triton kernels where they run, else plain
torch; and why. The only place that imports triton, and only when it is chosen.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from torchweave_ray.attention.base import AttentionBackend
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.attention.varlen import VarlenAttention, why_no_varlen
from torchweave_ray.config import EngineConfig, RunnerConfig
from torchweave_ray.errors import ConfigError
from torchweave_ray.models.native_executor import NativeExecutor
from torchweave_ray.models.ops import Ops
from torchweave_ray.models.spec import Executor
from torchweave_ray.runner.device import why_no_triton
from torchweave_ray.runner.sampler import Sampler, sample
from torchweave_ray.runner.sampling.native import NativeSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Of the torch executor; transformers' models take the attention, the native executor none."""

    attention: AttentionBackend
    ops: Ops | None = None
    """None: plain torch's."""


def choose_kernels(device: torch.device, config: EngineConfig) -> Kernels:
    """By what the device can run; `executor: torch` forgoes it. Raises ConfigError for what is
    asked for and cannot be had."""
    reason = why_no_triton(device, may_interpret=config.runner.executor == "triton")
    if config.runner.executor == "triton" and reason is not None:
        raise ConfigError(f"runner.executor is 'triton', but {reason}")
    if config.runner.executor == "torch":
        reason = "runner.executor is 'torch'"
    if config.runner.attention == "varlen":
        why = reason or why_no_varlen(config.cache.block_size)
        if why is None and config.runner.batch_invariant:
            why = "with it a row depends on its batch, which runner.batch_invariant forbids"
        if why is not None:
            raise ConfigError(f"runner.attention is 'varlen', but {why}")
    if reason is None:
        if device.type == "cpu":
            from torchweave_ray.kernels.triton.interpreter import interpret

            interpret()
        from torchweave_ray.attention.triton_paged import TritonPagedAttention
        from torchweave_ray.kernels.triton.ops import TritonOps

        attention: AttentionBackend = TritonPagedAttention()
        if config.runner.attention == "varlen":
            attention = VarlenAttention(attention)
        logger.info("[Kernels] triton on %s, attention: %s", device, config.runner.attention)
        return Kernels(attention, TritonOps(config.runner.batch_invariant))
    level = logging.DEBUG if device.type == "cpu" else logging.WARNING
    logger.log(level, "[Kernels] plain torch: %s", reason)
    return Kernels(TorchPagedAttention())


def sampler_of(executor: Executor) -> Sampler:
    """On the executor's own threads, where it has some, or on its GPU."""
    if isinstance(executor, NativeExecutor):
        return NativeSampler(executor.team)
    if executor.name.startswith("triton"):
        from torchweave_ray.runner.sampling.triton import TritonSampler

        return TritonSampler()
    return sample


def check_invariance(executor: Executor, config: RunnerConfig) -> None:
    """Raises ConfigError where rows must not depend on their batch, and torch's products do."""
    if config.batch_invariant and executor.name in ("torch", "transformers"):
        raise ConfigError(
            f"runner.batch_invariant: the {executor.name} executor does not promise it; it takes "
            "the native executor or our Triton kernels"
        )
