"""A rank's slice of an artifact as an executor, and what cannot be had with several ranks.

The same on every rank. Knows no processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from torchweave_ray.attention.base import AttentionBackend
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ConfigError
from torchweave_ray.models.artifact import Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement
from torchweave_ray.models.ops import Weight
from torchweave_ray.models.spec import DecoderSpec
from torchweave_ray.models.tensors import fused_tensors
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_products, load_weights
from torchweave_ray.parallel.collectives import Collectives
from torchweave_ray.parallel.slices import Slice, check_divides, sliced_spec, sliced_tensor
from torchweave_ray.runner.kv_cache import KVShape


def check_ranks(
    config: EngineConfig,
    model: ModelConfig,
    manifest: Manifest,
    has_file: bool,
) -> None:
    """Raises ConfigError naming the field that does not go with `tensor_parallel_size`, or the
    number of the model that it does not divide. `has_file`: of weights, which every rank maps."""
    size = config.tensor_parallel_size
    refused = {
        "lora.source": config.lora.source is not None,
        "cache.spill": config.cache.spill is not None,
        "runner.executor native": config.runner.executor == "native",
        "runner.batch_invariant": config.runner.batch_invariant,
        "staging.target object_store": not has_file,
    }
    for name, is_set in refused.items():
        if is_set:
            raise ConfigError(
                f"{name} does not go with tensor_parallel_size {size}: leave it out, or use 1 rank"
            )
    if model.foreign is not None:
        raise ConfigError(
            f"tensor_parallel_size {size}: {model.architecture} is run by transformers, whole"
        )
    check_divides(model, size, fused_tensors(model, manifest.quantization))


def open_slice(
    directory: Path,
    model: ModelConfig,
    manifest: Manifest,
    placement: Placement,
    attention: AttentionBackend,
    collectives: Collectives,
) -> TorchExecutor:
    """Only the rank's own rows and columns are copied out of the mapped file."""
    own = Slice(collectives.rank, collectives.num_ranks)
    part = partial(sliced_tensor, config=model, part=own)
    load = load_weights if placement.ops is None else load_products
    tensors: Mapping[str, Weight] = load(
        directory, model, placement.dtype, placement.device, manifest, part=part
    )
    return TorchExecutor(sliced_spec(model, own), tensors, attention, placement.ops, collectives)


def slice_shape(spec: DecoderSpec, block_size: int, kv_dtype: torch.dtype) -> KVShape:
    """Of the KV cache of a rank: its own heads'."""
    return KVShape(spec.num_layers, spec.num_kv_heads, block_size, spec.head_dim, kv_dtype)
