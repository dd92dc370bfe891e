"""A small random Llama: as a Hugging Face checkpoint folder, and as an artifact of ours.

Everything is seeded, so the same arguments give the same bytes. Takes some 50 ms and loads neither
transformers nor Ray. No test in here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from torchweave_ray.models.artifact import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Manifest,
    complete_artifact,
    file_sha256,
)
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import LAYOUT, fuse, fused_tensors

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1, 2; the last one ends a text."""
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": EOS_TOKEN_ID,
    "dtype": "float32",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "vocab_size": 307},
    "odd": {"hidden_size": 48, "intermediate_size": 75, "num_attention_heads": 3,
            "num_key_value_heads": 3},
    "biased": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
}  # fmt: skip
"""Overrides of that config, for what packs or rounds weights."""
_TEXT = (
    "Gravity is the force by which a planet or other body draws objects toward its center. "
    "The force of gravity keeps all of the planets in orbit around the sun. What is a star? "
    "A star is a body of hot gas that gives off its own light. The sun is the star that is "
    "nearest to the earth, and the other stars are so far away that they look like points. "
    "Größe, naïve café, 你好世界, привет, 😀 and def main(): return 1 + 2 are text as well.\n"
)


def make_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE trained on one paragraph: it can say every text, mostly byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def make_checkpoint(directory: Path, seed: int = 0, tokens: int = 300, **overrides: Any) -> Path:
    """A folder as `save_pretrained` leaves it, with a tokenizer of so many `tokens`. `overrides`
    are keys of its `config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    hf_config = {**TINY_CONFIG, **overrides}
    config = ModelConfig.from_hf(hf_config)
    _write_json(directory / CONFIG, hf_config)
    _write_json(
        directory / GENERATION_CONFIG,
        {"bos_token_id": 1, "eos_token_id": hf_config["eos_token_id"], "pad_token_id": 2},
    )
    _write_json(
        directory / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[1],
            "eos_token": SPECIAL_TOKENS[2],
            "pad_token": SPECIAL_TOKENS[2],
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    make_tokenizer(tokens).save(str(directory / TOKENIZER))
    tensors = _random_tensors(config, seed)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def make_tiny_artifact(
    directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """The same model as a sealed artifact in `directory`, without the optimizer. Returns it."""
    make_checkpoint(directory, seed, **overrides)
    source_sha256 = file_sha256(directory / WEIGHTS)
    hf_config = json.loads((directory / CONFIG).read_text())
    config = ModelConfig.from_hf(hf_config)
    sources = load_file(directory / WEIGHTS)
    fused = {
        tensor.name: fuse(tensor, [sources[name] for name in tensor.sources]).to(dtype)
        for tensor in fused_tensors(config)
    }
    (directory / WEIGHTS).unlink()  # `sources` still maps the old file
    save_file(fused, directory / WEIGHTS)
    name = str(dtype).removeprefix("torch.")
    recipe = {"source": "tiny", "dtype": name}
    draft = Manifest(
        "", "tiny", source_sha256, config.architecture, name, LAYOUT, {}, recipe=recipe
    )
    complete_artifact(directory, draft)
    return directory


def model_options(artifact: Path) -> list[str]:
    """Of a command: `--model` and, written beside it, `--engine` with little memory."""
    engine = artifact.parent / "engine.yaml"
    engine.write_text("{max_model_len: 256, cache: {kv_memory: 4194304}, runner: {threads: 1}}")
    return ["--model", str(artifact), "--engine", str(engine)]


def _random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Large enough that logits lie far apart and each token depends on all before it."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for fused in fused_tensors(config):
        for name, shape in zip(fused.sources, fused.source_shapes, strict=True):
            values = torch.randn(shape, generator=generator)
            if "norm" in name:
                values = 1.0 + 0.1 * values
            elif "embed_tokens" in name:
                values = 0.5 * values
            elif name.endswith("weight"):
                values = 2.0 * values / shape[1] ** 0.5
            tensors[name] = values
    return tensors


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
