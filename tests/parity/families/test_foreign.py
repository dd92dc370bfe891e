"""Models of no family of ours: staged and run through transformers' own code, or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.pipeline import optimize
from optimizer.quantization import INT8
from optimizer.recipe import Recipe
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "Olmo2ForCausalLM": {"model_type": "olmo2"},
    "Olmo3ForCausalLM": {"model_type": "olmo3", "sliding_window": 12, "num_hidden_layers": 4},
    "CohereForCausalLM": {"model_type": "cohere"},
    "MixtralForCausalLM": {"model_type": "mixtral", "sliding_window": 12},
    "GPT2LMHeadModel": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4,
                        "n_positions": 256},
}  # fmt: skip


GROUPS = {"Olmo3ForCausalLM": (1, 3), "MixtralForCausalLM": (0, 1)}
"""Full and sliding ones."""


def _checkpoint(folder: Path, name: str, seed: int = 0, **keys: Any) -> Path:
    """As transformers saves it, with the tiny tokenizer."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    make_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    values = {**SHAPE, **MODELS.get(name, {}), **keys}
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [n if n == "Olmo2ForCausalLM" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_greedy_ids_are_those_of_transformers(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    source = _checkpoint(tmp_path / "source", name)
    # The comparison with the source runs with the slow ones.
    verify: Any = "none" if name == "Olmo2ForCausalLM" else "auto"
    recipe = Recipe("m", str(source), dtype="float32", verify=verify)
    artifact = optimize(recipe, tmp_path / "store")
    model = getattr(transformers, name).from_pretrained(source, attn_implementation="eager").eval()
    prompts = [[3 + 7 * i % 290 for i in range(n)] for n in (5, 40, 90)]
    wanted = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with (
        caplog.at_level(logging.WARNING),
        LLM(artifact, max_model_len=128, scheduler={"max_num_batched_tokens": 32}) as llm,
    ):
        assert llm.info.executor == "transformers"
        groups = llm._loaded.runner.limits.groups
        assert (groups.num_full, groups.num_sliding) == GROUPS.get(name, (1, 0))
        assert [list(c.token_ids) for c in llm.generate(prompts, greedy)] == wanted
        llm.sleep()
        assert [list(c.token_ids) for c in llm.generate(prompts, greedy)] == wanted
        assert llm.stats().num_wakes == 1
    assert "transformers' own code runs it, slower" in caplog.text
    with pytest.raises(ConfigError, match=r"'native', but .* is run by transformers"):
        LLM(artifact, max_model_len=64, runner={"executor": "native"})
    with pytest.raises(ArtifactError, match=f"{name}.* cannot be quantised"):
        optimize(Recipe("q", str(source), quantization=INT8), tmp_path / "store")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["NoSuchLM"], "model_type": "llama"}, "no causal language model"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "cannot be replaced"),
        (
            {
                "architectures": ["Lfm2ForCausalLM"],
                "model_type": "lfm2",
                "layer_types": ["conv"] * 3,
            },
            "layers of type conv",
        ),
        (
            {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "auto_map": 1},
            "auto_map",
        ),
    ],
)
def test_others_are_refused_with_the_list(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({**SHAPE, **config}))
    with pytest.raises(ArtifactError, match=rf"architectures.*{says}.*LlamaForCausalLM"):
        optimize(source, tmp_path / "store")
