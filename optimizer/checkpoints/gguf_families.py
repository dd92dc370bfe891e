"""What each GGUF architecture calls its tensors, which keys it has, and the config.json they mean.

Tensors and keys of llama.cpp's converter (convert_hf_to_gguf.py); scales that a file does not hold
are those that llama.cpp computes with. What is not in a table here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Values = Mapping[str, Any]
"""An architecture's metadata, without its prefix."""
_WINDOW = "attention.sliding_window"
TOP: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROUTED = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}


@dataclass(frozen=True, slots=True)
class GgufFamily:
    architecture: str
    """Hugging Face's."""
    model_type: str
    parts: Mapping[str, str]
    """Hugging Face's name of a layer's tensor by its own; {} is an expert, of those in one."""
    keys: frozenset[str] = frozenset()
    """Further ones than all have."""
    config: Callable[[Values, Collection[str]], dict[str, Any]] = lambda values, names: {}
    """Further keys of config.json, of (metadata, Hugging Face names of the tensors)."""
    is_permuted: bool = False
    """The rows of a head of q and k are interleaved: llama.cpp rotates neighbours."""
    norm_offset: float = 0.0
    """What the file's norms are more than Hugging Face's."""
    may_rotate_partly: bool = False


def _llama(values: Values, names: Collection[str]) -> dict[str, Any]:
    biases = {
        "attention_bias": any(name.endswith("q_proj.bias") for name in names),
        "mlp_bias": any(name.endswith("gate_proj.bias") for name in names),
    }
    if not values.get(_WINDOW):
        return biases
    # Mistral's converter calls it llama, too; the window is what tells them apart.
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return {**biases, **mistral, "sliding_window": values[_WINDOW]}


def _qwen3(values: Values, names: Collection[str]) -> dict[str, Any]:
    return {"attention_bias": any(name.endswith("q_proj.bias") for name in names)}


def _qwen3_moe(values: Values, names: Collection[str]) -> dict[str, Any]:
    dense = [
        i for i in range(values["block_count"]) if f"model.layers.{i}.mlp.gate.weight" not in names
    ]
    return {
        **_qwen3(values, names),
        "num_experts": values["expert_count"],
        "num_experts_per_tok": values["expert_used_count"],
        "moe_intermediate_size": values["expert_feed_forward_length"],
        "norm_topk_prob": values.get("expert_weights_norm", True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


def _gemma(values: Values, wide_layers: int) -> dict[str, Any]:
    """`wide_layers`: how many the 27B model has, whose scale counts a head's share of the hidden
    size, not its dimensions."""
    hidden, heads = values["embedding_length"], values["attention.head_count"]
    is_wide = values["block_count"] == wide_layers
    scalar = hidden // heads if is_wide else values.get("attention.key_length", hidden // heads)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": values[_WINDOW],
        "attn_logit_softcapping": values.get("attn_logit_softcapping"),
        "final_logit_softcapping": values.get("final_logit_softcapping"),
    }


def _gemma2(values: Values, names: Collection[str]) -> dict[str, Any]:
    return {**_gemma(values, 46), "sliding_window_pattern": 2}


def _gemma3(values: Values, names: Collection[str]) -> dict[str, Any]:
    pattern = values.get(_WINDOW + "_pattern", 6)
    local = values.get("rope.freq_base_swa", 10_000.0)
    return {**_gemma(values, 62), "sliding_window_pattern": pattern, "rope_local_base_freq": local}


def _phi3(values: Values, names: Collection[str]) -> dict[str, Any]:
    return {"sliding_window": values.get(_WINDOW) or None}


_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_EXPERT_KEYS = frozenset(
    {"expert_count", "expert_used_count", "expert_feed_forward_length", "expert_weights_norm"}
)
GGUF_FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": GgufFamily(
            "LlamaForCausalLM", "llama", _PARTS, frozenset({_WINDOW}), _llama, is_permuted=True
        ),
        "smollm3": GgufFamily(
            "SmolLM3ForCausalLM", "smollm3", _PARTS, config=_llama, is_permuted=True
        ),
        "qwen2": GgufFamily("Qwen2ForCausalLM", "qwen2", _PARTS),
        "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3", {**_PARTS, **_QK_NORMS}, config=_qwen3),
        "qwen3moe": GgufFamily(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            {**_PARTS, **_QK_NORMS, **_ROUTED},
            _EXPERT_KEYS,
            _qwen3_moe,
        ),
        "gemma2": GgufFamily(
            "Gemma2ForCausalLM",
            "gemma2",
            {**_PARTS, **_NORMS_AROUND},
            _CAPS | {_WINDOW},
            _gemma2,
            norm_offset=1.0,
        ),
        "gemma3": GgufFamily(
            "Gemma3ForCausalLM",
            "gemma3_text",
            {**_PARTS, **_NORMS_AROUND, **_QK_NORMS},
            _CAPS | {_WINDOW, _WINDOW + "_pattern", "rope.freq_base_swa"},
            _gemma3,
            norm_offset=1.0,
        ),
        "phi3": GgufFamily(
            "Phi3ForCausalLM",
            "phi3",
            _FUSED,
            frozenset({_WINDOW}),
            _phi3,
            may_rotate_partly=True,
        ),
    }
)
