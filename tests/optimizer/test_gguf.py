"""GGUF files: equal to the safetensors they were made from, and refused by name where not known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from optimizer.checkpoints.gguf_tokenizer import PRE_TOKENIZERS
from optimizer.pipeline import optimize
from optimizer.recipe import Recipe
from tests.optimizer.gguf_files import make_gguf
from tests.tiny import CHAT_TEMPLATE, make_checkpoint
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import read_manifest

TEXTS = (
    "What is gravity?",
    "Größe naïve 你好 😀 привет",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b",
    "  x = 12345\n\n\tx  1",
    "don't I'LL we've",
    "",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny")


def _config(artifact: Path, name: str = "config.json") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((artifact / name).read_text())
    return values


def test_float32_gives_the_very_bytes_of_the_safetensors_path(
    tmp_path: Path, checkpoint: Path
) -> None:
    store = tmp_path / "store"
    direct = optimize(checkpoint, store)
    staged = optimize(make_gguf(tmp_path / "m.gguf", checkpoint), store)
    name = "model.safetensors"
    assert read_manifest(staged).files[name] == read_manifest(direct).files[name]
    wanted, got = _config(direct), _config(staged)
    assert {key: got[key] for key in wanted.keys() & got.keys()} == {
        key: wanted[key] for key in wanted.keys() & got.keys()
    }
    assert (got["head_dim"], got["rope_scaling"], got["mlp_bias"]) == (16, None, False)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_half_floats(tmp_path: Path, checkpoint: Path, dtype: Any) -> None:
    source = make_gguf(tmp_path / "m.gguf", checkpoint, "F16")
    artifact = optimize(Recipe("m", str(source), dtype=dtype), tmp_path / "store")
    embed = load_file(artifact / "model.safetensors")["embed.weight"]
    original = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    wanted = original.to(torch.float16).to(torch.float32)
    assert torch.equal(embed, wanted if dtype == "float32" else wanted.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_quantised_types(tmp_path: Path, checkpoint: Path, kind: str) -> None:
    source = make_gguf(tmp_path / "m.gguf", checkpoint, kind)
    artifact = optimize(Recipe("m", str(source), dtype="float32"), tmp_path / "store")
    held = load_file(artifact / "model.safetensors")
    down = load_file(checkpoint / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    number = gguf.GGMLQuantizationType[kind]
    wanted = gguf.dequantize(gguf.quantize(down.numpy(), number), number).reshape(down.shape)
    assert torch.equal(held["layers.1.down_proj.weight"], torch.from_numpy(np.array(wanted)))
    assert read_manifest(optimize(str(source), tmp_path / "store")).dtype == "bfloat16"


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)
    staged = optimize(make_gguf(tmp_path / "m.gguf", checkpoint), tmp_path / "store")
    assert _config(staged)["tie_word_embeddings"] is True
    assert "head.weight" not in load_file(staged / "model.safetensors")


def test_biases_are_permuted_too(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", attention_bias=True, mlp_bias=True)
    direct = optimize(checkpoint, tmp_path / "store")
    staged = optimize(make_gguf(tmp_path / "m.gguf", checkpoint), tmp_path / "store")
    name = "model.safetensors"
    assert read_manifest(staged).files[name] == read_manifest(direct).files[name]


def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, checkpoint: Path) -> None:
    staged = optimize(make_gguf(tmp_path / "m.gguf", checkpoint), tmp_path / "store")
    wanted = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    got = Tokenizer.from_file(str(staged / "tokenizer.json"))
    for text in TEXTS:
        ids = wanted.encode(text).ids
        assert got.encode(text).ids == ids
        assert got.decode(ids) == wanted.decode(ids)
        assert got.decode(ids, skip_special_tokens=False) == text
    settings = _config(staged, "tokenizer_config.json")
    assert settings["chat_template"] == CHAT_TEMPLATE
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["model_max_length"] == 512
    assert _config(staged, "generation_config.json")["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4", "ĊĠ", "7", "Ġdon", "'t", "Ġx", "'", "LL", "Ġ"]),
        ("gpt-2", ["a", "Ġ", "Ġ1234", "Ċ", "Ġ7", "Ġdon", "'t", "Ġx", "'", "LL", "Ġ"]),
        (
            "qwen2",
            ["a", "Ġ", "Ġ", "1", "2", "3", "4", "Ċ", "Ġ", "7", "Ġdon", "'t", "Ġx", "'LL", "Ġ"],
        ),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "4", "Ċ", "Ġ", "7", "Ġdon", "'t", "Ġx", "'LL", "Ġ"]),
    ],
)
def test_each_pre_tokenizer_splits_as_llama_cpp_does(pre: str, pieces: list[str]) -> None:
    """For each, ids of 843 texts were equal to llama.cpp's before its name was let in; but qwen2's
    split is compared with transformers', in test_gguf_tokenizers.py."""
    build = PRE_TOKENIZERS[pre].build
    assert [p for p, _ in build().pre_tokenize_str("a  1234\n 7 don't x'LL ")] == pieces
    assert len(PRE_TOKENIZERS) == 4, "a name more needs a comparison, and a row here"


def test_llama_bpe_keeps_whole_tokens_and_begins_texts(tmp_path: Path, checkpoint: Path) -> None:
    merges = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["merges"]
    longest = max(merges, key=lambda pair: len("".join(pair)))
    kept = {"tokenizer.ggml.merges": [" ".join(pair) for pair in merges if pair != longest]}
    source = make_gguf(tmp_path / "m.gguf", checkpoint, pre="llama-bpe", extra=kept)
    artifact = optimize(source, tmp_path / "s")
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    token = "".join(longest)
    assert tokenizer.encode(token.replace("Ġ", " ")).ids == [1, tokenizer.token_to_id(token)]
    assert _config(artifact, "tokenizer_config.json")["add_bos_token"] is True


def test_begin_and_end_flags_become_a_template(tmp_path: Path, checkpoint: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    source = make_gguf(tmp_path / "m.gguf", checkpoint, extra=flags)
    tokenizer = Tokenizer.from_file(str(optimize(source, tmp_path / "s") / "tokenizer.json"))
    plain = tokenizer.encode("hi", add_special_tokens=False).ids
    assert tokenizer.encode("hi").ids == [1, *plain, 2]


def test_user_defined_tokens_stay_whole_but_are_text(tmp_path: Path, checkpoint: Path) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    vocab = sorted(model["vocab"], key=lambda token: model["vocab"][token])
    extra = {
        "tokenizer.ggml.tokens": [*vocab[:299], "<think>"],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"][:-1]],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 296 + [4],
    }
    source = make_gguf(tmp_path / "m.gguf", checkpoint, extra=extra)
    tokenizer = Tokenizer.from_file(str(optimize(source, tmp_path / "s") / "tokenizer.json"))
    ids = tokenizer.encode("a<think>b").ids
    assert ids[1] == 299
    assert tokenizer.decode(ids) == "a<think>b"


def _llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """As llama.cpp's converter writes them for low 1, high 4, original context 8192."""
    factors = []
    for frequency in (1.0 / theta ** (i / head_dim) for i in range(0, head_dim, 2)):
        wavelength = 2 * math.pi / frequency
        smooth = (8192 / wavelength - 1.0) / 3.0
        factors.append(
            1.0
            if wavelength < 2048
            else factor
            if wavelength > 8192
            else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(factors, dtype=np.float32)


def test_llama_3_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", rope_theta=500000.0)
    factors = {"rope_freqs.weight": _llama3_factors(32.0, 500000.0, 16)}
    staged = optimize(make_gguf(tmp_path / "m.gguf", checkpoint, tensors=factors), tmp_path / "s")
    assert _config(staged)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_linear_scaling(tmp_path: Path, checkpoint: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    staged = optimize(make_gguf(tmp_path / "m.gguf", checkpoint, extra=keys), tmp_path / "s")
    assert _config(staged)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            {"tokenizer.ggml.pre": "viking"},
            "pre-tokenizer 'viking' has not been tested; .*'smollm'",
        ),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None has not been tested"),
        (
            {"tokenizer.ggml.model": "t5"},
            "tokenizer 't5' is not supported; supported: 'gpt2'",
        ),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix"),
        ({"tokenizer.ggml.merges": ["no-space"]}, "merge 'no-space'"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "merges do not fit"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "does not fit the embedding's 300 rows"),
        ({"tokenizer.ggml.token_type": [6] * 300}, "token type 6"),
        ({"tokenizer.ggml.bos_token_id": 300}, "bos_token_id = 300 is no token"),
        ({"general.architecture": "falcon"}, "architecture 'falcon' is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.attention.causal": False}, "llama.attention.causal"),
        ({"llama.rope.dimension_count": 8}, "heads have 16 dimensions"),
        ({"llama.rope.scaling.type": "dynamic", "llama.rope.scaling.factor": 2.0}, "dynamic"),
        ({"llama.block_count": None}, "block_count"),
        ({"llama.block_count": 3}, "model.layers.2"),
        ({"split.count": 2}, "in several files"),
    ],
)
def test_what_we_do_not_know_is_refused_by_name(
    tmp_path: Path, checkpoint: Path, extra: dict[str, Any], says: str
) -> None:
    source = make_gguf(tmp_path / "m.gguf", checkpoint, extra=extra)
    with pytest.raises(ArtifactError, match=says):
        optimize(source, tmp_path / "store")


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "rope_freqs.weight"])
def test_unknown_tensors_and_factors(tmp_path: Path, checkpoint: Path, name: str) -> None:
    extra = {name: np.full(8, 1.5, dtype=np.float32)}
    source = make_gguf(tmp_path / "m.gguf", checkpoint, tensors=extra)
    with pytest.raises(ArtifactError, match=name):
        optimize(source, tmp_path / "store")


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000, -100])
def test_a_cut_file(tmp_path: Path, checkpoint: Path, keep: int) -> None:
    source = make_gguf(tmp_path / "m.gguf", checkpoint)
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"m\.gguf is not a whole GGUF file"):
        optimize(source, tmp_path / "store")
