"""Makes a GGUF of a tiny checkpoint as llama.cpp's converter would: permuted q and k, its names.

Written from the format's description, apart from the reader that it tests. No test in here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ARCHITECTURES = {
    "mistral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
"""Where it is not the model_type."""
_EXPERT = re.compile(r"(.*)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def make_gguf(
    path: Path,
    checkpoint: Path,
    quantization: str = "F32",
    pre: str = "gpt-2",
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    raw: Mapping[str, tuple[str, np.ndarray]] | None = None,
) -> Path:
    """`quantization` is of the matrices. `extra`: further or other metadata; None drops a key.
    `tensors`: further ones, by GGUF name. `raw`: type and bytes in place of some."""
    config = json.loads((checkpoint / "config.json").read_text())
    metadata = _metadata(config, checkpoint, pre) | dict(extra or {})
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            _add(writer, key, value)
    for name, values in _stacked(load_file(checkpoint / "model.safetensors")).items():
        if (gguf_name := _gguf_name(name, config)) in (raw or {}):
            kind, data = raw[gguf_name]
            writer.add_tensor(gguf_name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        _write(writer, gguf_name, _permuted(name, values, config), quantization)
    for name, values in (_rope_factors(config) | dict(tensors or {})).items():
        _write(writer, name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: Mapping[str, Any], checkpoint: Path, pre: str) -> dict[str, Any]:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    own = {
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
    } | _family_metadata(config)
    arch = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    return {
        "general.architecture": arch,
        **{key.replace("llama.", f"{arch}.", 1): value for key, value in own.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if vocab[token] in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": settings["chat_template"],
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write(writer: gguf.GGUFWriter, name: str, values: np.ndarray, quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def _family_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the keys that the converter writes for other families than Llama."""
    found: dict[str, Any] = {}
    names = {
        "head_dim": ("attention.key_length", "attention.value_length"),
        "sliding_window": ("attention.sliding_window",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
        "num_experts": ("expert_count",),
        "num_experts_per_tok": ("expert_used_count",),
        "moe_intermediate_size": ("expert_feed_forward_length",),
        "original_max_position_embeddings": ("rope.scaling.original_context_length",),
    }
    for key, its in names.items():
        if config.get(key) is not None and not (
            key == "sliding_window" and "qwen" in config["model_type"]
        ):
            found |= {f"llama.{name}": config[key] for name in its}
    heads = config["hidden_size"] // config["num_attention_heads"]
    if (factor := config.get("partial_rotary_factor")) is not None:
        found["llama.rope.dimension_count"] = int(heads * factor)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        found["llama.rope.scaling.type"] = scaling["rope_type"]
        found["llama.rope.scaling.factor"] = scaling["factor"]
    if "original_max_position_embeddings" in scaling:
        original = scaling["original_max_position_embeddings"]
        found["llama.rope.scaling.original_context_length"] = original
    if config["model_type"] == "gemma3_text":
        found["llama.rope.freq_base_swa"] = config["rope_local_base_freq"]
    return found


def _rope_factors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "longrope":
        return {}
    return {
        f"rope_factors_{length}.weight": np.array(scaling[f"{length}_factor"], dtype=np.float32)
        for length in ("long", "short")
    }


def _stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All experts of a layer as one tensor, under a name with `exps`."""
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            found[name] = values
        else:
            stacked = f"{match[1]}.mlp.exps.{match[3]}.weight"
            experts.setdefault(stacked, {})[int(match[2])] = values
    for name, each in experts.items():
        found[name] = np.stack([each[i] for i in range(len(each))])
    return found


def _gguf_name(name: str, config: Mapping[str, Any]) -> str:
    if name in _TOP:
        return _TOP[name]
    names = _NAMES | (_GEMMA_NAMES if "gemma" in config["model_type"] else {})
    _, _, layer, part = name.split(".", 3)
    part, _, suffix = part.rpartition(".")
    if part.startswith("mlp.exps."):
        return f"blk.{layer}.ffn_{part.removeprefix('mlp.exps.')}_exps.{suffix}"
    return f"blk.{layer}.{names[part]}.{suffix}"


def _permuted(name: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Rows 0..h-1, h..2h-1 of a head become 0, h, 1, h+1, ...: llama.cpp rotates neighbours in the
    families of Llama. Gemma's norms become what it multiplies with."""
    if "gemma" in config["model_type"] and name.endswith("norm.weight"):
        return values + 1.0
    if config["model_type"] not in ("llama", "mistral", "smollm3"):
        return values
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{part}." in name:
            halves = values.reshape(config[heads], 2, -1, *values.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values
