"""Artifacts with random weights, made without the optimizer, and these weights for transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from torchweave_ray.models.artifact import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Manifest,
    complete_artifact,
)
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import LAYOUT, fused_tensors

_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY: Mapping[str, Any] = {
    **_LLAMA,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINYLLAMA: Mapping[str, Any] = {
    **_LLAMA,
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": TINY,
    "qwen3": {
        **TINY,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
    },
    "gemma2": {
        **TINY,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
}
"""Norms of heads; soft caps, a window, norms before the adds, a tied head."""


def make_artifact(folder: Path, hf_config: Mapping[str, Any], dtype: torch.dtype) -> Path:
    """Seeded: the same arguments give the same weights. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    config = ModelConfig.from_hf(dict(hf_config))
    (folder / CONFIG).write_text(json.dumps({**hf_config, "dtype": name}))
    (folder / TOKENIZER_CONFIG).write_text("{}")
    _tokenizer(config.vocab_size).save(str(folder / TOKENIZER))
    save_file(_weights(config, dtype), folder / WEIGHTS)
    recipe = {"source": "random", "dtype": name}
    draft = Manifest("", "random", "0" * 64, config.architecture, name, LAYOUT, {}, recipe=recipe)
    complete_artifact(folder, draft)
    return folder


def state_dict(folder: Path) -> dict[str, Tensor]:
    """An artifact's weights under Hugging Face's names."""
    config = ModelConfig.read(folder)
    stored = load_file(folder / WEIGHTS)
    found: dict[str, Tensor] = {}
    for tensor in fused_tensors(config):
        rows = [shape[0] for shape in tensor.source_shapes]
        parts: tuple[Tensor, ...] = torch.split(stored[tensor.name], rows)
        found |= dict(zip(tensor.sources, parts, strict=True))
    return found


def _weights(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Such that logits lie far apart and each token depends on all before it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for tensor in fused_tensors(config):
        values = torch.randn(tensor.shape, generator=generator)
        if "norm" in tensor.name:
            values = 1.0 + 0.1 * values
        elif len(tensor.shape) == 2 and "embed" not in tensor.name:
            values *= 2.0 / tensor.shape[1] ** 0.5
        tensors[tensor.name] = values.to(dtype)
    return tensors


def _tokenizer(vocab_size: int) -> Tokenizer:
    """The bytes, and as many words of no meaning as it takes."""
    letters = sorted(ByteLevel.alphabet())
    words = [f"w{i}" for i in range(vocab_size - len(letters))]
    vocab = {token: i for i, token in enumerate((*letters, *words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
