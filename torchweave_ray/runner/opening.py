"""A runner around an executor: its KV cache sized for this machine, its sampler, its first step.

Knows neither artifacts nor who asks the runner for steps.
"""

from __future__ import annotations

import torch

from torchweave_ray.attention.base import block_bytes
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.plan import RuntimeLimits, ScheduledSequence, StepPlan
from torchweave_ray.kernels.kv_layout import TILE
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.spec import DecoderSpec, Executor
from torchweave_ray.runner.adapters import AdapterStore
from torchweave_ray.runner.device import free_memory
from torchweave_ray.runner.kv_cache import KVCache, KVShape, size_kv_cache
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.runner.native_sampler import sampler_of
from torchweave_ray.sampling_params import SamplingParams


def open_runner(
    executor: Executor,
    spec: DecoderSpec,
    model: ModelConfig,
    config: EngineConfig,
    kv_dtype: torch.dtype,
    device: torch.device,
    store: AdapterStore | None = None,
    bytes_beside: int = 0,
) -> ModelRunner:
    """`bytes_beside`: of KV memory, that each block takes elsewhere, too. Raises ConfigError with
    the numbers when the memory is not there."""
    block_size = config.cache.block_size
    size = size_kv_cache(
        config.cache,
        bytes_beside
        + block_bytes(spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, kv_dtype),
        free_memory(device),
        config.scheduler.max_num_seqs,
        config.max_model_len,
        model.max_position_embeddings,
    )
    shape = KVShape(spec.num_layers, spec.num_kv_heads, block_size, spec.head_dim, kv_dtype)
    limits = RuntimeLimits(
        size.num_blocks,
        block_size,
        size.max_model_len,
        spec.vocab_size,
        model.eos_token_ids,
        kept_positions=_kept_positions(model),
    )
    kv_cache = KVCache(shape, size.num_blocks, device)
    loaded = {} if store is None else store.loaded
    return ModelRunner(executor, kv_cache, limits, device, sampler_of(executor), loaded)


def _kept_positions(model: ModelConfig) -> int | None:
    """Only where all layers slide: the others need all positions, and share the blocks."""
    if model.sliding_window is None or not model.sees_window_only:
        return None
    return model.sliding_window + TILE


def run_first_step(runner: ModelRunner) -> None:
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
