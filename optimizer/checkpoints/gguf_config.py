"""GGUF metadata as Hugging Face's config.json and generation_config.json. Pure data, no tensors.

Keys of the architecture that we don't know are refused: they may change what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimizer.checkpoints.checkpoint import TensorInfo
from optimizer.checkpoints.gguf_families import GGUF_FAMILIES, GgufFamily
from torchweave_ray.errors import ArtifactError

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
        "rope.scaling.attn_factor",
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


@dataclass(frozen=True, slots=True)
class RopeFactors:
    """What a file's tensors say about rotary frequencies: a divisor of each."""

    llama3: Sequence[float] | None = None
    long: Sequence[float] | None = None
    short: Sequence[float] | None = None


def family_of(metadata: Mapping[str, Any]) -> GgufFamily:
    """Raises ArtifactError with the list for an architecture that is not on it."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
        raise ArtifactError(
            f"GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(GGUF_FAMILIES)}"
        )
    return GGUF_FAMILIES[architecture]


def hf_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], factors: RopeFactors
) -> dict[str, Any]:
    """`tensors` by Hugging Face name."""
    family = family_of(metadata)
    values = _own_keys(metadata, family)
    heads = _integer(values, "attention.head_count")
    hidden = _integer(values, "embedding_length")
    head_dim, rotary_dim = _head_dims(values, hidden // heads, family)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ArtifactError("GGUF tensor token_embd.weight is missing")
    theta = _number(values, "rope.freq_base", 10_000.0)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
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
        "rope_scaling": _rope_scaling(values, factors, theta, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        **family.config(values, tensors.keys()),
        **_special_ids(metadata),
    }
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return config


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


def _own_keys(metadata: Mapping[str, Any], family: GgufFamily) -> dict[str, Any]:
    if metadata.get("split.count", 1) > 1:
        raise ArtifactError("a GGUF in several files is not supported: merge it into one first")
    prefix = f"{metadata['general.architecture']}."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    known = _KNOWN | family.keys
    for key, value in values.items():
        if key not in known and not (key == "expert_count" and value == 0):
            raise ArtifactError(f"GGUF key {prefix}{key} = {value!r} is not supported")
    return values


def _head_dims(values: Mapping[str, Any], default: int, family: GgufFamily) -> tuple[int, int]:
    """Dimensions of a head, and how many of them turn."""
    head_dim = _integer(values, "attention.key_length", default)
    value_length = _integer(values, "attention.value_length", head_dim)
    rotary_dim = _integer(values, "rope.dimension_count", head_dim)
    lengths = {"attention.value_length": value_length}
    if not family.may_rotate_partly:
        lengths["rope.dimension_count"] = rotary_dim
    for key, value in lengths.items():
        if value != head_dim:
            raise ArtifactError(
                f"GGUF key {key} = {value} is not supported: heads have {head_dim} dimensions"
            )
    return head_dim, rotary_dim


def _rope_scaling(
    values: Mapping[str, Any], factors: RopeFactors, theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", "none")
    original = values.get("rope.scaling.original_context_length")
    scaling: dict[str, Any] = {"original_max_position_embeddings": original} if original else {}
    if (attention := values.get("rope.scaling.attn_factor")) is not None:
        scaling["attention_factor"] = attention
    if factors.llama3 is not None:
        if kind != "none":
            raise ArtifactError(f"GGUF has both rope_freqs.weight and rope scaling {kind!r}")
        return _llama3_scaling(factors.llama3, theta, head_dim)
    if factors.long is not None and factors.short is not None:
        lists = {"long_factor": list(factors.long), "short_factor": list(factors.short)}
        return {"rope_type": "longrope", **lists, **scaling}
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": _number(values, "rope.scaling.factor"), **scaling}


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
        raise ArtifactError(f"GGUF key {key} must be one whole number above 0, got {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06."""
    value = values.get(key, default)
    if type(value) is not float:
        raise ArtifactError(f"GGUF key {key} must be a float, got {value!r}")
    return float(str(np.float32(value)))
