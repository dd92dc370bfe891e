"""The one place where the parts are wired: artifact -> executor -> KV cache -> runner -> engine.

Knows every part's constructor and none's inside. Nothing here or below imports Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from torchweave_ray.attention.base import block_bytes
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits, ScheduledSequence, StepPlan
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.kernels.library import KernelsUnavailable, load_library
from torchweave_ray.models.artifact import Manifest, verify_artifact
from torchweave_ray.models.config import ModelConfig, read_hf_config
from torchweave_ray.models.lowering import CannotLower
from torchweave_ray.models.native_executor import NativeExecutor
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import DecoderSpec, Executor
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights
from torchweave_ray.outputs import ModelInfo
from torchweave_ray.runner.device import (
    free_memory,
    numerics_path,
    resolve_device,
    resolve_dtype,
    set_num_threads,
)
from torchweave_ray.runner.kv_cache import KVCache, KVShape, size_kv_cache
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.runner.native_sampler import NativeSampler
from torchweave_ray.runner.sampler import sample
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import Detokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run steps."""

    runner: ModelRunner
    info: ModelInfo
    manifest: Manifest
    tokenizer_dir: Path
    """For `load_tokenizer`."""
    startup_s: Mapping[str, float]
    """Seconds by stage, in their order: verify, weights, kv_cache, first_step."""


def load_model(
    artifact_dir: Path, config: EngineConfig, model_id: str | None = None
) -> LoadedModel:
    """Load an artifact; `model_id` defaults to its folder's name.

    Raises ArtifactError naming the file or tensor at fault, or ConfigError with the numbers when
    the configuration does not fit this machine.
    """
    stages = _Stages()
    with stages.timed("verify"):
        manifest = verify_artifact(artifact_dir)
        model = ModelConfig.from_hf(read_hf_config(artifact_dir))
        _check_eos(model)
        spec = build_spec(model)
    device = resolve_device(config.runner.device)
    dtype = resolve_dtype(config.runner.dtype, manifest.dtype)
    threads = set_num_threads(config.runner.threads)
    with stages.timed("weights"):
        tensors = load_weights(artifact_dir, model, dtype, device)
        executor = _choose_executor(config.runner.executor, spec, tensors, device, threads)
    with stages.timed("kv_cache"):
        runner = _build_runner(executor, spec, model, config, dtype, device)
    with stages.timed("first_step"):
        _run_first_step(runner)
    info = ModelInfo(
        id=model_id or artifact_dir.absolute().name,
        artifact_id=manifest.artifact_id,
        numerics_id=_numerics_id(manifest, executor, dtype, device),
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        device=str(device),
        dtype=_dtype_name(dtype),
        executor=_executor_name(executor),
        max_model_len=runner.limits.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        block_size=runner.limits.block_size,
    )
    return LoadedModel(runner, info, manifest, artifact_dir, stages.seconds)


def _choose_executor(
    choice: str,
    spec: DecoderSpec,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    threads: int,
) -> NativeExecutor | TorchExecutor:
    """Raises ConfigError when native is asked for and cannot be had."""
    if choice != "torch":
        try:
            executor = NativeExecutor(spec, tensors, load_library(), threads)
            # What is left for torch is small, and its threads would spin on our cores.
            set_num_threads(1)
            return executor
        except (KernelsUnavailable, CannotLower) as error:
            if choice == "native":
                raise ConfigError(f"runner.executor is 'native', but {error}") from error
            logger.warning("the torch executor runs this model: %s", error)
    return TorchExecutor(spec, tensors, TorchPagedAttention())


def build_engine(loaded: LoadedModel, config: EngineConfig, detokenizer: Detokenizer) -> Engine:
    return Engine(
        loaded.runner, detokenizer, config.cache, config.scheduler, loaded.manifest.artifact_id
    )


def _build_runner(
    executor: NativeExecutor | TorchExecutor,
    spec: DecoderSpec,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> ModelRunner:
    block_size = config.cache.block_size
    size = size_kv_cache(
        config.cache,
        block_bytes(spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, dtype),
        free_memory(device),
        config.scheduler.max_num_seqs,
        config.max_model_len,
        model.max_position_embeddings,
    )
    shape = KVShape(spec.num_layers, spec.num_kv_heads, block_size, spec.head_dim, dtype)
    limits = RuntimeLimits(
        size.num_blocks, block_size, size.max_model_len, spec.vocab_size, model.eos_token_ids
    )
    sampler = NativeSampler(executor.team) if isinstance(executor, NativeExecutor) else sample
    kv_cache = KVCache(shape, size.num_blocks, device)
    return ModelRunner(executor, kv_cache, limits, device, sampler)


def _run_first_step(runner: ModelRunner) -> None:
    """Compute one token: maps the weights in, so that no request waits for the disk, and a model
    that cannot run fails the start. What it leaves in block 0 is overwritten before it is read."""
    seq = ScheduledSequence(
        seq_id=-1,
        start=0,
        num_tokens=1,
        token_ids=[0],
        num_prompt_tokens=1,
        block_table=[0],
        sampling=SamplingParams(temperature=0.0),
        seed=0,
    )
    runner.submit(StepPlan((seq,))).result()
    runner.release(seq.seq_id)


def _check_eos(model: ModelConfig) -> None:
    for token_id in model.eos_token_ids:
        if token_id >= model.vocab_size:
            raise ArtifactError(
                f"config.json: eos_token_id {token_id} is outside the vocabulary of "
                f"{model.vocab_size}"
            )


def _numerics_id(
    manifest: Manifest, executor: Executor, dtype: torch.dtype, device: torch.device
) -> str:
    path = executor.isa if isinstance(executor, NativeExecutor) else numerics_path(device)
    parts = [manifest.artifact_id, executor.name, path, _dtype_name(dtype)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _executor_name(executor: Executor) -> str:
    return f"native {executor.isa}" if isinstance(executor, NativeExecutor) else executor.name


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Stages:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
