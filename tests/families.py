"""A tiny configuration of each family with every flag exercised. No test in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NUM_LAYERS = 4
WINDOW = 12
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
}
_SLIDING = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)


def _longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.5 * i for i in range(pairs)],
    }


def _family(architecture: str, model_type: str, **keys: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": NUM_LAYERS,
        **keys,
    }


FAMILIES: Mapping[str, dict[str, Any]] = {
    "smollm3": _family(
        "SmolLM3ForCausalLM",
        "smollm3",
        no_rope_layers=[1, 1, 0, 1],
        tie_word_embeddings=True,
    ),
    "mistral": _family("MistralForCausalLM", "mistral", sliding_window=WINDOW, head_dim=32),
    "qwen2": _family("Qwen2ForCausalLM", "qwen2", sliding_window=WINDOW, max_window_layers=2),
    "qwen2-window": _family(
        "Qwen2ForCausalLM",
        "qwen2",
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
        rope_scaling=YARN,
    ),
    "qwen3": _family("Qwen3ForCausalLM", "qwen3", head_dim=32, rope_scaling=YARN),
    "gemma2": _family(
        "Gemma2ForCausalLM",
        "gemma2",
        head_dim=32,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    ),
    "gemma3": _family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        head_dim=32,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        query_pre_attn_scalar=24,
        rope_theta=50_000.0,
        rope_local_base_freq=1000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        tie_word_embeddings=True,
    ),
    "phi3": _family(
        "Phi3ForCausalLM",
        "phi3",
        hidden_size=128,
        partial_rotary_factor=0.5,
        sliding_window=20,
        original_max_position_embeddings=32,
        rope_scaling=_longrope(8),
    ),
    "qwen3-moe": _family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        head_dim=32,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
}
