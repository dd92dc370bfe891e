"""A runner around an executor: its KV cache sized for this machine, its sampler, its first step.

Knows neither artifacts nor who asks the runner for steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from torchweave_ray.attention.base import block_bytes
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.kv_groups import ONE_GROUP, KVGroups
from torchweave_ray.engine.plan import RuntimeLimits, ScheduledSequence, StepOutput, StepPlan
from torchweave_ray.errors import ConfigError
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.spec import DecoderSpec, Executor, Experts, Linear
from torchweave_ray.runner.adapters import AdapterStore
from torchweave_ray.runner.backends import sampler_of
from torchweave_ray.runner.device import free_memory, graphs_of, peak_bytes
from torchweave_ray.runner.graphs import DecodeGraphs, Ladder
from torchweave_ray.runner.grouping import Grouping, group_layers
from torchweave_ray.runner.inputs import Chunk, build_inputs
from torchweave_ray.runner.kv_cache import RAM_SHARE, KVCache, KVShape, KVSize, size_kv_cache
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_GPU_SHARE = 0.9
_CHUNK = 1024
"""Tokens of one sequence in a step, at most, of a model with windows: what an artifact's measured
settings ask for is known later. Windows keep room for it."""
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What is another where several processes compute a model together (parallel/)."""

    free_memory: Callable[[torch.device], int] = free_memory
    kv_cache: Callable[[KVShape, int, torch.device], KVCache] = KVCache
    runner: Callable[..., ModelRunner] = ModelRunner


_ALONE = RunnerParts()


def open_runner(
    executor: Executor,
    spec: DecoderSpec,
    model: ModelConfig,
    config: EngineConfig,
    kv_dtype: torch.dtype,
    device: torch.device,
    store: AdapterStore | None = None,
    bytes_beside: int = 0,
    parts: RunnerParts = _ALONE,
) -> ModelRunner:
    """`bytes_beside`: of KV memory, that each block takes elsewhere, too. Raises ConfigError with
    the numbers when the memory is not there."""
    block_size, step_depth = config.cache.block_size, _step_depth(config, device)
    grouping = grouping_of(model, config, step_depth)
    num, groups = grouping.num_layers, grouping.groups
    heads = spec.num_kv_heads, block_size, spec.head_dim, kv_dtype
    shape = KVShape(num, *heads, grouping.places)
    step_bytes = peak_bytes(
        lambda: largest_steps(executor, shape, config, model, device, groups, parts.kv_cache),
        device,
    )
    block = block_bytes(num, spec.num_kv_heads, spec.head_dim, block_size, kv_dtype)
    size, kv_cache = allocate(
        lambda: size_kv_cache(
            config.cache,
            bytes_beside + block,
            max(0, parts.free_memory(device) - step_bytes),
            config.scheduler.max_num_seqs,
            config.max_model_len,
            model.max_position_embeddings,
            RAM_SHARE if device.type == "cpu" else _GPU_SHARE,
            groups,
        ),
        lambda num_blocks: parts.kv_cache(shape, num_blocks, device),
    )
    limits = RuntimeLimits(
        size.num_blocks,
        block_size,
        size.max_model_len,
        spec.vocab_size,
        model.eos_token_ids,
        step_depth=step_depth,
        groups=groups,
    )
    graphs = _graphs(executor, spec, config, size, device)
    loaded = {} if store is None else store.loaded
    sampler = sampler_of(executor)
    return parts.runner(executor, kv_cache, limits, device, sampler, loaded, graphs)


def _graphs(
    executor: Executor,
    spec: DecoderSpec,
    config: EngineConfig,
    size: KVSize,
    device: torch.device,
) -> DecodeGraphs | None:
    """Of our Triton kernels, which look at nothing on the host; experts are chosen there. Not of
    slices: other ranks would have to capture and replay in step with this one."""
    make_graph = graphs_of(device)
    is_capturable = executor.name.startswith("triton") and not any(
        isinstance(op, Experts) or (isinstance(op, Linear) and op.is_partial) for op in spec.ops
    )
    if make_graph is None or not is_capturable or not config.runner.decode_graphs:
        return None
    return DecodeGraphs(Ladder(config.scheduler.max_num_seqs, size.max_model_len), make_graph)


def allocate(
    find_size: Callable[[], KVSize], make: Callable[[int], KVCache]
) -> tuple[KVSize, KVCache]:
    """A cache of the size that fits; if somebody else takes memory meanwhile, a smaller one. Raises
    ConfigError when even the second try fails, with what is missing."""
    size = find_size()
    try:
        return size, make(size.num_blocks)
    except torch.OutOfMemoryError as error:
        logger.warning(
            "[Cache] %d KV blocks did not fit (%s); measuring anew", size.num_blocks, error
        )
    size = find_size()
    try:
        return size, make(size.num_blocks)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{size.num_blocks} KV blocks do not fit, though so much was free a moment ago: "
            "another process takes memory of this GPU; lower kv_memory or kv_memory_share "
            f"({error})"
        ) from error


def _step_depth(config: EngineConfig, device: torch.device) -> int:
    guesses = config.speculation.method != "none"
    depth = config.runner.step_depth
    if depth == "auto":
        return int(device.type != "cpu" and not guesses)
    if depth and guesses:
        raise ConfigError(
            "runner.step_depth 1 does not go with speculation.method "
            f"{config.speculation.method!r}: what follows a token is guessed when it is known"
        )
    return depth


def largest_steps(
    executor: Executor,
    shape: KVShape,
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    groups: KVGroups = ONE_GROUP,
    make_cache: Callable[[KVShape, int, torch.device], KVCache] = KVCache,
) -> None:
    """As many tokens of prompts as a step may have, then as many decodes, at the longest context:
    each with as many rows of logits. All sequences share the blocks of one prompt."""
    num_tokens, num_seqs = config.scheduler.step_tokens, config.scheduler.max_num_seqs
    longest = config.max_model_len or model.max_position_embeddings
    chunk = min(num_tokens, longest)
    lengths = [chunk] * (num_tokens // chunk)
    lengths += [num_tokens - sum(lengths)] * (num_tokens % chunk > 0)
    blocks = list(range(-(-chunk // shape.block_size)))
    repeated = blocks * -(-longest // (len(blocks) * shape.block_size))
    cache = make_cache(shape, len(blocks), device)
    for chunks in (
        [Chunk(_sequence(n, 0, [blocks] * groups.num, [0] * n)) for n in lengths],
        [Chunk(_sequence(1, 0, [repeated] * groups.num, [0] * longest, longest - 1))] * num_seqs,
    ):
        inputs = build_inputs(chunks, shape.block_size, device, groups=groups)
        rows = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        executor.forward(replace(inputs, logit_rows=rows), cache.layers)
    cache.close()


def grouping_of(model: ModelConfig, config: EngineConfig, step_depth: int = 0) -> Grouping:
    sliding = model.sliding_layers or (False,) * model.num_layers
    longest = config.max_model_len or model.max_position_embeddings
    chunk = config.scheduler.max_num_batched_tokens or max(_CHUNK, config.scheduler.step_tokens)
    return group_layers(
        sliding, model.sliding_window, config.cache.block_size, longest, chunk, step_depth
    )


def run_first_step(runner: ModelRunner) -> None:
    """Compute one token: maps the weights in, so that no request waits for the disk, and a model
    that cannot run fails the start. Then one of each size that is captured. What this leaves in
    block 0 is overwritten before it is read."""
    for num_seqs in (1, *runner.captured_sizes):
        tables = [[0]] * runner.limits.groups.num
        plan = StepPlan(tuple(_sequence(1, -1 - i, tables, [0]) for i in range(num_seqs)))
        runner.submit(plan).result()
        for seq in plan.sequences:
            runner.release(seq.seq_id)


def _sequence(
    num_tokens: int,
    seq_id: int,
    block_tables: list[list[int]],
    token_ids: list[int],
    start: int = 0,
) -> ScheduledSequence:
    return ScheduledSequence(
        seq_id=seq_id,
        start=start,
        num_tokens=num_tokens,
        token_ids=token_ids,
        num_prompt_tokens=start + num_tokens,
        block_tables=block_tables,
        sampling=_GREEDY,
        seed=0,
        output=StepOutput.SAMPLE,
    )
