"""Makes a GGUF of a tiny checkpoint as llama.cpp's converter would: permuted q and k, its names.

Written from the format's description, apart from the reader that it tests. No test in here.
"""

from __future__ import annotations

import json
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
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
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
    for name, values in load_file(checkpoint / "model.safetensors").items():
        if (gguf_name := _gguf_name(name)) in (raw or {}):
            kind, data = raw[gguf_name]
            writer.add_tensor(gguf_name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        _write(writer, gguf_name, _permuted(name, values, config), quantization)
    for name, values in (tensors or {}).items():
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
    return {
        "general.architecture": "llama",
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
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


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, part = name.split(".", 3)
    part, _, suffix = part.rpartition(".")
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"


def _permuted(name: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Rows 0..h-1, h..2h-1 of a head become 0, h, 1, h+1, ...: llama.cpp rotates neighbours."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{part}." in name:
            halves = values.reshape(config[heads], 2, -1, *values.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values
