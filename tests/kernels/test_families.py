"""Each family on the native executor: near torch, the same bits in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import FAMILIES
from tests.kernels.native import (
    FORMATS,
    NativeDecoder,
    assert_near_torch,
    assert_same_bits_in_any_batch,
    quantized_weights,
)
from tests.parity.paged import CPU, PagedDecoder, Text, random_texts
from tests.tiny import make_tiny_artifact
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.kernels.library import KernelsUnavailable, Library, load_library
from torchweave_ray.kernels.packing import PackedLinear, unpack_linear
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights


@pytest.fixture(scope="module", params=FAMILIES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_tiny_artifact(folder, dtype=torch.bfloat16, **FAMILIES[request.param])


@pytest.fixture
def best() -> Library:
    try:
        return load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def test_logits_are_those_of_the_torch_executor(artifact: Path, best: Library) -> None:
    assert_near_torch(artifact, best)


def test_rows_have_the_same_bits_in_any_batch(artifact: Path, best: Library) -> None:
    assert_same_bits_in_any_batch(artifact, best, {}, seeds=(1,))


@pytest.mark.slow
def test_on_every_instruction_set(artifact: Path, library: Library) -> None:
    assert_near_torch(artifact, library)
    assert_same_bits_in_any_batch(artifact, library, {})
    assert_same_bits_in_any_batch(artifact, library, FORMATS["int4"])


def test_quantised_experts(tmp_path: Path, best: Library) -> None:
    make_tiny_artifact(tmp_path, dtype=torch.bfloat16, **FAMILIES["qwen3-moe"])
    formats = FORMATS["mixed"] | {"experts.gate_up": "int8-group32"}
    config = ModelConfig.read(tmp_path)
    weights = load_weights(tmp_path, config, torch.float32, CPU)
    packed = quantized_weights(config, weights, formats)
    meant = {n: unpack_linear(w) if isinstance(w, PackedLinear) else w for n, w in packed.items()}
    exact = PagedDecoder(tmp_path)
    exact.executor = TorchExecutor(exact.spec, meant, TorchPagedAttention())
    native = NativeDecoder(tmp_path, best, formats=formats)
    texts = random_texts(1, 30, 70)
    expected, actual = (
        torch.cat(d.step([(Text(ids), len(ids)) for ids in texts])) for d in (exact, native)
    )
    # Rows that other experts compute are other rows: those at the same ones count.
    errors = (actual - expected).square().mean(dim=1).sqrt() / expected.std()
    assert errors.median() < 0.08
    assert_same_bits_in_any_batch(tmp_path, best, formats, seeds=(1,))


def test_experts_with_many_rows_give_the_same_bits(tmp_path: Path, best: Library) -> None:
    """More rows an expert than a unit of work has: 500 x 3 over 6 experts."""
    make_tiny_artifact(tmp_path, dtype=torch.bfloat16, **FAMILIES["qwen3-moe"])
    text = random_texts(500)[0]
    whole = NativeDecoder(tmp_path, best, 2).step([(Text(text), len(text))])[0]
    decoder, sequence = NativeDecoder(tmp_path, best, 1), Text(text)
    parts = [decoder.step([(sequence, 100)])[0] for _ in range(5)]
    assert torch.equal(torch.cat(parts), whole)
