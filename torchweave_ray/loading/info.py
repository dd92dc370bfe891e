"""What a loaded model says of itself: its limits, formats, and the id of its numerics."""

from __future__ import annotations

import hashlib
import json

import torch

from torchweave_ray.config import EngineConfig
from torchweave_ray.models.artifact import Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement, executor_name
from torchweave_ray.models.native_executor import NativeExecutor
from torchweave_ray.models.spec import Executor
from torchweave_ray.outputs import ModelInfo
from torchweave_ray.runner.device import numerics_path
from torchweave_ray.runner.model_runner import ModelRunner


def describe(
    name: str,
    manifest: Manifest,
    model: ModelConfig,
    executor: Executor,
    runner: ModelRunner,
    config: EngineConfig,
    placement: Placement,
    kv_dtype: torch.dtype,
) -> ModelInfo:
    dtype, device = placement.dtype, placement.device
    return ModelInfo(
        id=name,
        artifact_id=manifest.artifact_id,
        numerics_id=_numerics_id(manifest, executor, dtype, kv_dtype, device),
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        device=str(device),
        dtype=_dtype_name(dtype),
        executor=executor_name(executor),
        max_model_len=runner.limits.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        block_size=runner.limits.block_size,
        kv_dtype=_dtype_name(kv_dtype),
        quantization=manifest.quantization,
        speculation=config.speculation.method,
        has_adapters=config.lora.source is not None,
    )


def _numerics_id(
    manifest: Manifest,
    executor: Executor,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> str:
    path = executor.isa if isinstance(executor, NativeExecutor) else numerics_path(device)
    parts = [manifest.artifact_id, executor.name, path, *map(_dtype_name, (dtype, kv_dtype))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
