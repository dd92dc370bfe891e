"""A decoder-only transformer as a DecoderSpec, by the flags of its ModelConfig.

Llama is the plain one: RMSNorm, rotary grouped-query attention, gated MLP, two residual adds.
Which model has which flag is config/families.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchweave_ray.attention.base import AttentionShape
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.rope import inverse_frequencies
from torchweave_ray.models.spec import (
    Attention,
    DecoderSpec,
    Embed,
    Experts,
    GatedActivation,
    Linear,
    Op,
    RMSNorm,
    Rope,
)
from torchweave_ray.models.tensors import EMBED, HEAD, NORM, fused_tensors, layer_name


def build_decoder(config: ModelConfig) -> DecoderSpec:
    """`head_ops` read "hidden" as the picked rows [R, hidden_size]."""
    ropes = _Ropes.of(config)
    ops: list[Op] = [Embed(EMBED, "hidden", config.embedding_scale)]
    for layer in range(config.num_layers):
        ops += _attention(config, layer, ropes)
        ops += _mlp(config, layer)
    head = EMBED if config.tie_word_embeddings else HEAD
    return DecoderSpec(
        architecture=config.architecture,
        ops=tuple(ops),
        head_ops=(
            RMSNorm("hidden", "normed", NORM, config.rms_norm_eps, config.norm_offset),
            Linear("normed", "logits", head),
        ),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tensors=tuple(tensor.name for tensor in fused_tensors(config)),
        logits_soft_cap=config.logits_soft_cap,
    )


@dataclass(frozen=True, slots=True)
class _Ropes:
    full: Rope
    sliding: Rope

    @classmethod
    def of(cls, config: ModelConfig) -> _Ropes:
        full, sliding = (
            Rope(inverse_frequencies(rope, config.rotary_dim), rope.attention_scaling)
            for rope in (config.rope, config.local_rope or config.rope)
        )
        return cls(full, sliding)


def _attention(config: ModelConfig, layer: int, ropes: _Ropes) -> list[Op]:
    is_sliding = bool(config.sliding_layers) and config.sliding_layers[layer]
    rotates = not config.rotating_layers or config.rotating_layers[layer]
    rope = ropes.sliding if is_sliding else ropes.full
    shape = AttentionShape(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        scale=config.attention_scale,
        sliding_window=config.sliding_window if is_sliding else None,
        soft_cap=config.attention_soft_cap,
    )
    attention = Attention(
        "qkv",
        "attended",
        layer,
        shape,
        rope if rotates else None,
        q_norm=layer_name(layer, "q_norm.weight") if config.qk_norm else None,
        k_norm=layer_name(layer, "k_norm.weight") if config.qk_norm else None,
        norm_eps=config.rms_norm_eps,
        norm_weight_offset=config.norm_offset,
    )
    return [
        _norm(config, layer, "input_norm"),
        _linear(layer, "normed", "qkv", "qkv_proj", config.attention_bias),
        attention,
        *_added(config, layer, "attended", "o_proj", config.output_bias, "attention_out_norm"),
    ]


def _mlp(config: ModelConfig, layer: int) -> list[Op]:
    norm = _norm(config, layer, "post_attention_norm")
    experts = config.experts
    if experts is not None and experts.layers[layer]:
        return [
            norm,
            _linear(layer, "normed", "router_logits", "router", has_bias=False),
            Experts(
                "normed",
                "router_logits",
                "hidden",
                layer_name(layer, "experts.gate_up_proj.weight"),
                layer_name(layer, "experts.down_proj.weight"),
                experts.num,
                experts.top_k,
                experts.normalize,
                config.hidden_act,
            ),
        ]
    return [
        norm,
        _linear(layer, "normed", "gate_up", "gate_up_proj", config.mlp_bias),
        GatedActivation("gate_up", "gated", config.hidden_act),
        *_added(config, layer, "gated", "down_proj", config.mlp_bias, "mlp_out_norm"),
    ]


def _added(
    config: ModelConfig, layer: int, x: str, name: str, has_bias: bool, norm: str
) -> list[Op]:
    """A product into the residual stream, through a norm where the model has `post_norms`."""
    if not config.post_norms:
        return [_linear(layer, x, "hidden", name, has_bias, accumulate=True)]
    return [
        _linear(layer, x, "branch", name, has_bias),
        RMSNorm(
            "branch",
            "hidden",
            layer_name(layer, f"{norm}.weight"),
            config.rms_norm_eps,
            config.norm_offset,
            accumulate=True,
        ),
    ]


def _norm(config: ModelConfig, layer: int, name: str) -> RMSNorm:
    weight = layer_name(layer, f"{name}.weight")
    return RMSNorm("hidden", "normed", weight, config.rms_norm_eps, config.norm_offset)


def _linear(
    layer: int, x: str, out: str, name: str, has_bias: bool, accumulate: bool = False
) -> Linear:
    weight = layer_name(layer, f"{name}.weight")
    bias = layer_name(layer, f"{name}.bias") if has_bias else None
    return Linear(x, out, weight, bias, accumulate)
