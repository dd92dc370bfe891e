"""Families through the whole pipeline, as a recipe stages them, and through the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from optimizer.pipeline import optimize
from optimizer.quantization import INT4, INT8, NONE, Quantization
from optimizer.recipe import Bars, Recipe
from tests.families import FAMILIES
from tests.optimizer.gguf_files import make_gguf
from tests.tiny import TINY_CONFIG, make_checkpoint
from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.library import KernelsUnavailable, load_library
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import read_manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.sampling_params import SamplingParams

# Random weights lie nearer to each other than a model's: what is looked at is that all is in place.
BARS = Bars(max_kl=0.5, min_top1=0.5, max_perplexity_ratio=1.5)
CASES = [("qwen3-moe", INT8, False)]
SLOW = [(name, form, gguf) for name in FAMILIES for form, gguf in ((NONE, False), (INT4, True))]


@pytest.mark.parametrize(
    ("name", "quantization", "from_gguf"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_staged_and_served(
    tmp_path: Path, name: str, quantization: Quantization, from_gguf: bool
) -> None:
    keys = FAMILIES[name]
    if "moe_intermediate_size" in keys:  # a GGUF's blocks are of 32 inputs
        keys = {**keys, "moe_intermediate_size": 64}
    source = make_checkpoint(tmp_path / "source", **keys)
    if from_gguf:
        source = make_gguf(tmp_path / "m.gguf", source, "Q4_1")
    recipe = Recipe("m", str(source), dtype="bfloat16", quantization=quantization, bars=BARS)
    artifact = optimize(recipe, tmp_path / "store")
    assert bool(read_manifest(artifact).quantization) is quantization.is_any
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    with LLM(artifact, max_model_len=128, runner={"executor": "native"}) as llm:
        texts = llm.generate([[5, 6, 7], list(range(3, 60))], greedy)
        again = [llm.generate([prompt], greedy)[0] for prompt in ([5, 6, 7], list(range(3, 60)))]
    assert [c.token_ids for c in texts] == [c.token_ids for c in again]


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", **FAMILIES["gemma3"])
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    assert tokenizer.token_to_id("<image_soft_token>") == 300
    tokenizer.save(str(source / "tokenizer.json"))
    artifact = optimize(Recipe("m", str(source), verify="none"), tmp_path / "store")
    staged = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    assert staged.get_vocab_size() == 300
    assert staged.encode("a star").ids == tokenizer.encode("a star").ids


def test_phi3_may_name_the_code_that_transformers_took_over() -> None:
    keys = {**TINY_CONFIG, **FAMILIES["phi3"], "auto_map": {"AutoConfig": "x.Y"}}
    assert all(ModelConfig.from_hf(keys).sliding_layers)
    with pytest.raises(ArtifactError, match="auto_map"):
        ModelConfig.from_hf({**keys, "architectures": ["MistralForCausalLM"]})
