"""ModelConfig reads what it can compute and refuses the rest, naming the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families import FAMILIES
from tests.tiny import TINY_CONFIG
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.config import ModelConfig, RopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMOLLM2 = {
    **TINY_CONFIG,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}


def _read(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_hf({**TINY_CONFIG, **overrides})


def test_the_published_config_of_smollm2() -> None:
    config = ModelConfig.from_hf(SMOLLM2)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.vocab_size) == (64, 49152)
    assert config.rope == RopeConfig(theta=100000.0)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)


def test_both_rope_layouts_mean_the_same() -> None:
    old = _read(rope_theta=5e5, rope_scaling=LLAMA3)
    new = _read(rope_theta=None, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old.rope == new.rope == RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192)
    linear = RopeConfig(10000.0, "linear", 4.0)
    assert _read(rope_scaling={"type": "linear", "factor": 4.0}).rope == linear
    assert _read(rope_parameters={"rope_type": "default", "rope_theta": 1e4}).rope == RopeConfig()


def test_what_is_left_out_has_the_default_of_llama() -> None:
    config = {
        key: value
        for key, value in TINY_CONFIG.items()
        if key not in ("num_key_value_heads", "hidden_act", "rope_theta", "tie_word_embeddings")
    }
    read = ModelConfig.from_hf(config)
    assert (read.num_kv_heads, read.head_dim, read.hidden_act) == (4, 16, "silu")
    assert (read.rope, read.tie_word_embeddings) == (RopeConfig(), False)


@pytest.mark.parametrize(
    ("value", "ids"), [(None, ()), (7, (7,)), ([7, 0], (7, 0)), ([], ())], ids=str
)
def test_end_tokens(value: Any, ids: tuple[int, ...]) -> None:
    assert _read(eos_token_id=value).eos_token_ids == ids


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_CONFIG, "eos_token_id": 9}))
    assert ModelConfig.read(tmp_path).eos_token_ids == (9,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert ModelConfig.read(tmp_path).eos_token_ids == (9, 8)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read"):
        ModelConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"mlp_bias": 1}, "mlp_bias"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 300.0}, "vocab_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"max_position_embeddings": "8k"}, "max_position_embeddings"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "rope_scaling.beta"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refused_by_name(overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ArtifactError, match=rf"config\.json: {key}"):
        _read(**overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "key"),
    [
        ("qwen2", {"max_window_layers": "all"}, "max_window_layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("qwen2-window", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2-window", {"sliding_window": -1}, "sliding_window"),
        ("qwen3-moe", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("qwen3-moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3-moe", {"mlp_only_layers": 1}, "mlp_only_layers"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("gemma3", {"rope_parameters": "x", "rope_scaling": None}, "rope_parameters"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.long_factor"),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
)
def test_families_refuse_by_name(name: str, overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ArtifactError, match=rf"config\.json: {key}"):
        _read(**{**FAMILIES[name], **overrides})


def test_gemma_3_in_both_layouts_of_rope() -> None:
    old = _read(**FAMILIES["gemma3"])
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
    keys = dict.fromkeys(("rope_theta", "rope_scaling", "rope_local_base_freq"))
    new = _read(**{**FAMILIES["gemma3"], **keys, "rope_parameters": nested})
    assert (old.rope, old.local_rope) == (new.rope, new.local_rope)
    assert old.rope.type == "linear"
    assert old.local_rope == RopeConfig(1000.0)
