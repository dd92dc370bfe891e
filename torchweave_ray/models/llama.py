"""The Llama family as a DecoderSpec: SmolLM2, TinyLlama, Llama 2 and 3.

A plain pre-norm decoder: RMSNorm, rotary grouped-query attention, gated MLP, two residual adds.
"""

from __future__ import annotations

from torchweave_ray.attention.base import AttentionShape
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.rope import inverse_frequencies
from torchweave_ray.models.spec import (
    Attention,
    DecoderSpec,
    Embed,
    GatedActivation,
    Linear,
    Op,
    RMSNorm,
    Rope,
)
from torchweave_ray.models.tensors import EMBED, HEAD, NORM, fused_tensors, layer_name


def build_llama(config: ModelConfig) -> DecoderSpec:
    """`head_ops` read "hidden" as the picked rows [R, hidden_size]."""
    rope = Rope(inverse_frequencies(config.rope, config.head_dim))
    shape = AttentionShape(
        config.num_heads, config.num_kv_heads, config.head_dim, scale=config.head_dim**-0.5
    )
    ops: list[Op] = [Embed(EMBED, "hidden")]
    for layer in range(config.num_layers):
        ops += _layer(config, layer, shape, rope)
    head = EMBED if config.tie_word_embeddings else HEAD
    return DecoderSpec(
        architecture=config.architecture,
        ops=tuple(ops),
        head_ops=(
            RMSNorm("hidden", "normed", NORM, config.rms_norm_eps),
            Linear("normed", "logits", head),
        ),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tensors=tuple(tensor.name for tensor in fused_tensors(config)),
    )


def _layer(config: ModelConfig, layer: int, shape: AttentionShape, rope: Rope) -> list[Op]:
    eps = config.rms_norm_eps

    def norm(name: str) -> RMSNorm:
        return RMSNorm("hidden", "normed", layer_name(layer, f"{name}.weight"), eps)

    def linear(x: str, out: str, name: str, bias: bool, accumulate: bool = False) -> Linear:
        weight = layer_name(layer, f"{name}.weight")
        bias_name = layer_name(layer, f"{name}.bias") if bias else None
        return Linear(x, out, weight, bias_name, accumulate)

    return [
        norm("input_norm"),
        linear("normed", "qkv", "qkv_proj", config.attention_bias),
        Attention("qkv", "attended", layer, shape, rope),
        linear("attended", "hidden", "o_proj", config.attention_bias, accumulate=True),
        norm("post_attention_norm"),
        linear("normed", "gate_up", "gate_up_proj", config.mlp_bias),
        GatedActivation("gate_up", "gated", config.hidden_act),
        linear("gated", "hidden", "down_proj", config.mlp_bias, accumulate=True),
    ]
