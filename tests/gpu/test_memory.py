"""Memory of a GPU, as far as a CPU can tell: pieces that go up, and a cache that did not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_artifact
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ConfigError
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.upload import Uploader
from torchweave_ray.models.weights import load_weights
from torchweave_ray.runner.device import peak_bytes
from torchweave_ray.runner.kv_cache import KVCache, KVShape, KVSize
from torchweave_ray.runner.opening import allocate, largest_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize("num", [0, 1, 7, 8, 9, 100])
def test_a_tensor_goes_up_piece_by_piece(num: int) -> None:
    source = torch.randn(num, 3).bfloat16().t()  # not contiguous
    moved = torch.zeros(3, num, dtype=torch.bfloat16)
    uploader = Uploader(CPU, piece=16)
    uploader.copy(source, moved)
    uploader.copy(source, moved)
    uploader.finish()
    assert torch.equal(moved, source)


def test_on_a_cpu_nothing_is_copied() -> None:
    source = torch.randn(4, 4)
    assert Uploader(CPU).move(source, torch.float32).data_ptr() == source.data_ptr()


def test_memory_that_another_process_took_makes_a_smaller_cache_or_an_error() -> None:
    sizes = [KVSize(40, 640), KVSize(10, 160)]
    shape = KVShape(1, 1, 16, 8, torch.float32)

    def make(num_blocks: int, most: int) -> KVCache:
        if num_blocks > most:
            raise torch.OutOfMemoryError(f"{num_blocks} blocks")
        return KVCache(shape, num_blocks, CPU)

    found = iter(sizes)
    size, cache = allocate(lambda: next(found), lambda num: make(num, 10))
    assert (size, cache.layers[0].keys.shape[0]) == (sizes[1], 10)
    found = iter(sizes)
    with pytest.raises(ConfigError, match="10 KV blocks do not fit"):
        allocate(lambda: next(found), lambda num: make(num, 5))


def test_the_largest_steps_run_in_a_cache_of_one_prompt(tmp_path: Path) -> None:
    """What a GPU is measured with, here for its result alone: it stays within its blocks."""
    artifact = make_tiny_artifact(tmp_path)
    model = ModelConfig.read(artifact)
    spec = build_spec(model)
    weights = load_weights(artifact, model, torch.float32, CPU)
    executor = TorchExecutor(spec, weights, TorchPagedAttention())
    shape = KVShape(spec.num_layers, spec.num_kv_heads, 16, spec.head_dim, torch.float32)
    for limits in ({"max_num_batched_tokens": 40}, {"max_num_batched_tokens": 1100}):
        config = EngineConfig.from_dict({"scheduler": {"max_num_seqs": 3, **limits}})
        largest_steps(executor, shape, config, model, CPU)
    assert peak_bytes(lambda: 1 / 0, CPU) == 0
