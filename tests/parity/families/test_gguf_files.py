"""A GGUF of each family gives the logits of the safetensors that it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.checkpoints import Checkpoint, open_checkpoint
from tests.families import FAMILIES
from tests.optimizer.gguf_files import make_gguf
from tests.parity.paged import PagedDecoder, Text
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.tensors import check_source_names, fuse, fused_tensors
from torchweave_ray.models.torch_executor import TorchExecutor

# What llama.cpp has no key for, or computes in one way only.
PLAIN: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "qwen2": {},
    "qwen3": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                               "original_max_position_embeddings": 32}},
    "mistral": {},
    "gemma2": {"layer_types": None, "query_pre_attn_scalar": 32},
    "gemma3": {"layer_types": None, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    "phi3": {},
    "qwen3-moe": {},
}  # fmt: skip


def _executor(checkpoint: Checkpoint) -> TorchExecutor:
    config = ModelConfig.from_hf(json.loads(checkpoint.documents()["config.json"]))
    check_source_names(config, checkpoint.tensors)
    weights = {
        tensor.name: fuse(tensor, [checkpoint.load(name).float() for name in tensor.sources])
        for tensor in fused_tensors(config)
    }
    return TorchExecutor(build_spec(config), weights, TorchPagedAttention())


@pytest.mark.parametrize("name", PLAIN)
def test_logits_are_those_of_the_safetensors(tmp_path: Path, name: str) -> None:
    values = {**FAMILIES[name], **PLAIN[name]}
    source = make_checkpoint(tmp_path / "checkpoint", **values)
    text = [3 + 7 * i % 290 for i in range(60)]
    decoder = PagedDecoder(make_tiny_artifact(tmp_path / "artifact", **values))
    expected = decoder.step([(Text(text), len(text))])[0]
    checkpoint = open_checkpoint(make_gguf(tmp_path / "m.gguf", source))
    documents = checkpoint.documents()
    assert json.loads(documents["config.json"])["architectures"] == values["architectures"]
    decoder.executor = _executor(checkpoint)
    got = decoder.step([(Text(text), len(text))])[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
