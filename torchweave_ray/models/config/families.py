"""What makes each architecture another than Llama, as flags of ModelConfig out of its own keys.

A family says which keys of `config.json` it reads that others refuse, the values of keys that its
configuration class leaves out, and the flags. Adding one: a function and a row here, its tensors'
names where they differ (models/tensors.py), a row of docs/models.md with its parity test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torchweave_ray.models.config.keys import (
    flag,
    integer,
    optional_positive,
    per_layer,
    positive,
    refused,
)
from torchweave_ray.models.config.rope import read_rope

Flags = dict[str, Any]
_SLIDING = {"sliding_attention": True, "full_attention": False}


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture in place of the MLP: `top_k` of `num` experts a token, by the router's softmax."""

    num: int
    top_k: int
    intermediate_size: int
    normalize: bool
    """The weights of the chosen ones add up to 1."""
    layers: tuple[bool, ...]
    """Which layers have them; the others have a plain MLP."""


@dataclass(frozen=True, slots=True)
class Family:
    flags: Callable[[Mapping[str, Any], int], Flags]
    """Of (config, number of layers)."""
    reads: frozenset[str] = frozenset()
    """Keys that change the computation, and that `flags` takes care of."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What an absent key means, where that is not Llama's."""
    theta: float = 10_000.0
    has_local_rope: bool = False


def _llama(config: Mapping[str, Any], num_layers: int) -> Flags:
    bias = flag(config, "attention_bias")
    return {"attention_bias": bias, "output_bias": bias, "mlp_bias": flag(config, "mlp_bias")}


def _smollm3(config: Mapping[str, Any], num_layers: int) -> Flags:
    rotates = config.get("no_rope_layers")
    if rotates is None:
        interval = integer(config, "no_rope_layer_interval", 4)
        rotating = tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    else:  # 1 where a layer has rope, whatever the name says
        rotating = per_layer(config, "no_rope_layers", num_layers, {1: True, 0: False})
    default = tuple(not r for r in rotating)
    return {
        **_llama(config, num_layers),
        "rotating_layers": rotating,
        **_windows(config, num_layers, default),
    }


def _mistral(config: Mapping[str, Any], num_layers: int) -> Flags:
    window = config.get("sliding_window")
    if window is None:
        return {}
    window = integer(config, "sliding_window")
    return {"sliding_window": window, "sliding_layers": (True,) * num_layers}


def _qwen2(config: Mapping[str, Any], num_layers: int) -> Flags:
    first = config.get("max_window_layers", 28)
    if type(first) is not int:
        raise refused("max_window_layers", first, "must be a number of layers")
    default = tuple(layer >= first for layer in range(num_layers))
    return {"attention_bias": True, **_windows(config, num_layers, default)}


def _qwen3(config: Mapping[str, Any], num_layers: int) -> Flags:
    bias = flag(config, "attention_bias")
    biases = {"attention_bias": bias, "output_bias": bias}
    return {**_qwen2(config, num_layers), **biases, "qk_norm": True}


def _qwen3_moe(config: Mapping[str, Any], num_layers: int) -> Flags:
    if flag(config, "use_sliding_window"):
        raise refused("use_sliding_window", True, "is not supported with experts")
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise refused("mlp_only_layers", dense, "must be a list of layers")
    step = integer(config, "decoder_sparse_step")
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    experts = ExpertsConfig(
        integer(config, "num_experts"),
        integer(config, "num_experts_per_tok"),
        integer(config, "moe_intermediate_size"),
        flag(config, "norm_topk_prob"),
        layers,
    )
    if experts.top_k > experts.num:
        raise refused("num_experts_per_tok", experts.top_k, f"exceeds {experts.num} experts")
    return {**_qwen3(config, num_layers), "experts": experts}


def _gemma2(config: Mapping[str, Any], num_layers: int) -> Flags:
    if config.get("layer_types") is None:
        pattern = integer(config, "sliding_window_pattern")
        sliding = tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    else:
        sliding = per_layer(config, "layer_types", num_layers, _SLIDING)
    bias = flag(config, "attention_bias")
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "sliding_window": integer(config, "sliding_window") if any(sliding) else None,
        "sliding_layers": sliding if any(sliding) else (),
        "attention_scale": positive(config, "query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": optional_positive(config, "attn_logit_softcapping"),
        "logits_soft_cap": optional_positive(config, "final_logit_softcapping"),
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": float(integer(config, "hidden_size")) ** 0.5,
    }


def _gemma3(config: Mapping[str, Any], num_layers: int) -> Flags:
    """Sliding layers have a rope of their own, which no scaling stretches."""
    nested = config.get("rope_parameters")
    local = nested.get("sliding_attention") if isinstance(nested, Mapping) else None
    values = {"rope_theta": config["rope_local_base_freq"]} if local is None else {}
    max_positions = integer(config, "max_position_embeddings")
    rope = read_rope(
        {"rope_parameters": local, **values}, max_positions, integer(config, "head_dim"), 10_000.0
    )
    return {**_gemma2(config, num_layers), "qk_norm": True, "local_rope": rope}


def _phi3(config: Mapping[str, Any], num_layers: int) -> Flags:
    return {**_mistral(config, num_layers), "is_stored_fused": True}


def _windows(config: Mapping[str, Any], num_layers: int, default: tuple[bool, ...]) -> Flags:
    """Qwen's and SmolLM3's: a window counts only where `use_sliding_window` says so."""
    sliding = default
    if config.get("layer_types") is not None:
        sliding = per_layer(config, "layer_types", num_layers, _SLIDING)
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        if config.get("layer_types") is not None and any(sliding):
            raise refused("layer_types", config["layer_types"], "contradicts use_sliding_window")
        return {}
    if not any(sliding):
        return {}
    return {"sliding_window": integer(config, "sliding_window"), "sliding_layers": sliding}


_WINDOW_KEYS = frozenset({"sliding_window", "use_sliding_window", "layer_types"})
_GEMMA_KEYS = frozenset(
    {"sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping"}
)
_GEMMA2: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
)
_GEMMA3: Mapping[str, Any] = {
    **_GEMMA2,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": 10_000.0,
}
_QWEN3_MOE: Mapping[str, Any] = {"decoder_sparse_step": 1}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(_llama),
        "SmolLM3ForCausalLM": Family(
            _smollm3, _WINDOW_KEYS | {"no_rope_layers"}, {"tie_word_embeddings": True}, 2e6
        ),
        "MistralForCausalLM": Family(
            _mistral, frozenset({"sliding_window"}), {"sliding_window": 4096}
        ),
        "Qwen2ForCausalLM": Family(_qwen2, _WINDOW_KEYS),
        "Qwen3ForCausalLM": Family(_qwen3, _WINDOW_KEYS, {"head_dim": 128}),
        "Qwen3MoeForCausalLM": Family(_qwen3_moe, _WINDOW_KEYS, _QWEN3_MOE),
        "Gemma2ForCausalLM": Family(_gemma2, _GEMMA_KEYS, _GEMMA2),
        "Gemma3ForCausalLM": Family(_gemma3, _GEMMA_KEYS, _GEMMA3, 1e6, True),
        # Its checkpoints still name the code that transformers took over.
        "Phi3ForCausalLM": Family(
            _phi3, frozenset({"sliding_window", "partial_rotary_factor", "auto_map"})
        ),
    }
)
