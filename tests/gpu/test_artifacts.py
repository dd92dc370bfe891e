"""Artifacts for GPUs: rows of codes as they are, read as codes there and dequantised on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from optimizer.pipeline import optimize
from optimizer.quantization import INT8, parse_quantization
from optimizer.recipe import Recipe
from tests.parity.paged import Text, make_inputs
from tests.tiny import make_checkpoint
from torchweave_ray.attention.base import LayerKV
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.errors import ConfigError
from torchweave_ray.kernels.quantization import QuantizedLinear, dequantize
from torchweave_ray.models.artifact import verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.ops import TorchOps, Weight
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.tensors import QUANTIZED_ROWS
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_products, load_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_rows_of_codes(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)
    quantization = parse_quantization(name)
    recipe = Recipe("t", str(source), quantization=quantization, target="sm_90", verify="none")
    artifact = optimize(recipe, tmp_path / "store")
    manifest = verify_artifact(artifact, full=True)
    assert manifest.layout == QUANTIZED_ROWS
    config = ModelConfig.read(artifact)
    codes = load_products(artifact, config, torch.float32, CPU)
    plain = load_weights(artifact, config, torch.float32, CPU)
    is_coded = {key for key, weight in codes.items() if isinstance(weight, QuantizedLinear)}
    assert ("embed.weight" in is_coded) == (name != "fp8")
    assert len(is_coded) == 8 + (name != "fp8")
    for key in is_coded:
        weight = codes[key]
        assert isinstance(weight, QuantizedLinear)
        assert torch.equal(dequantize(weight), plain[key])
    logits = [_logits(config, weights) for weights in (codes, plain)]
    torch.testing.assert_close(*logits)


def _logits(config: ModelConfig, weights: Mapping[str, Weight]) -> torch.Tensor:
    spec, attention = build_spec(config), TorchPagedAttention()
    executor = TorchExecutor(spec, weights, attention, TorchOps(attention))
    shape = (2, spec.num_kv_heads, 16, spec.head_dim)
    kv = [LayerKV(torch.zeros(shape), torch.zeros(shape)) for _ in range(spec.num_layers)]
    return executor.forward(make_inputs([(Text([5, 9, 200], [1]), 3)], 16), kv)


def test_fp8_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match="'fp8' is for GPUs"):
        Recipe("t", "org/name", quantization=parse_quantization("fp8"))
    with pytest.raises(ConfigError, match="'gptq' does not round to fp8"):
        parse_quantization({"layers": "fp8", "method": "gptq"})
    assert Recipe("t", "org/name", quantization=INT8, target="sm_90").quantization == INT8
