"""GGUF metadata as Hugging Face's config.json and generation_config.json. Pure data, no tensors.

Keys of the architecture that we don't know are refused: they may change what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optimizer.checkpoints.checkpoint import TensorInfo
from torchweave_ray.errors import ArtifactError

_ARCHITECTURE = "llama"
_KNOWN = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
    }
)
# llama.cpp ends generation at control tokens of these texts whatever the id keys say.
_END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
CONTROL = 3  # tokenizer.ggml.token_type


def hf_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    rope_factors: Sequence[float] | None,
) -> dict[str, Any]:
    """`tensors` by Hugging Face name; `rope_factors`: what `rope_freqs.weight` holds, if there."""
    values = _own_keys(metadata)
    heads = _integer(values, "attention.head_count")
    hidden = _integer(values, "embedding_length")
    head_dim = _head_dim(values, hidden // heads)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ArtifactError("GGUF tensor token_embd.weight is missing")
    theta = _number(values, "rope.freq_base", 10_000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _integer(values, "feed_forward_length"),
        "num_hidden_layers": _integer(values, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(values, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _integer(values, "context_length"),
        "rms_norm_eps": _number(values, "attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(values, rope_factors, theta, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": any(name.endswith("q_proj.bias") for name in tensors),
        "mlp_bias": any(name.endswith("gate_proj.bias") for name in tensors),
        **_special_ids(metadata),
    }


def hf_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """End tokens: those of the id keys first, then control tokens that end a turn by their name."""
    ids = _special_ids(metadata)
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type", [])
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind == CONTROL and token in _END_TOKENS:
            ends.append(token_id)
    return ids | {"eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))}


def _own_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ArtifactError(
            f"GGUF architecture {architecture!r} is not supported; supported: {_ARCHITECTURE}"
        )
    if metadata.get("split.count", 1) > 1:
        raise ArtifactError("a GGUF in several files is not supported: merge it into one first")
    prefix = f"{_ARCHITECTURE}."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    for key, value in values.items():
        if key not in _KNOWN and not (key == "expert_count" and value == 0):
            raise ArtifactError(f"GGUF key {prefix}{key} = {value!r} is not supported")
    return values


def _head_dim(values: Mapping[str, Any], default: int) -> int:
    head_dim = _integer(values, "attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := _integer(values, key, head_dim)) != head_dim:
            raise ArtifactError(
                f"GGUF key llama.{key} = {value} is not supported: heads have {head_dim} dimensions"
            )
    return head_dim


def _rope_scaling(
    values: Mapping[str, Any], factors: Sequence[float] | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise ArtifactError(f"GGUF has both rope_freqs.weight and rope scaling {kind!r}")
        return _llama3_scaling(factors, theta, head_dim)
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _number(values, "rope.scaling.factor")}
    original = values.get("rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, of which GGUF keeps only the divisors of each frequency.

    Its four numbers are the published ones and the largest divisor; they are accepted only if
    they give back every divisor.
    """
    factor, low, high, original = float(max(factors)), 1.0, 4.0, 8192
    expected = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        if wavelength < original / high:
            expected.append(1.0)
        elif wavelength > original / low:
            expected.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append(1.0 / ((1.0 - smooth) / factor + smooth))
    if len(expected) != len(factors) or not np.allclose(expected, factors, rtol=1e-4):
        raise ArtifactError(
            "GGUF tensor rope_freqs.weight is not Llama 3's scaling of rotary pairs"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def _integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int or value < 1:
        raise ArtifactError(f"GGUF key llama.{key} must be one whole number above 0, got {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06."""
    value = values.get(key, default)
    if type(value) is not float:
        raise ArtifactError(f"GGUF key llama.{key} must be a float, got {value!r}")
    return float(str(np.float32(value)))
