"""The text of a model that reads images, too: staged as its text-only sibling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimizer.checkpoints import open_checkpoint
from optimizer.pipeline import optimize
from optimizer.recipe import Recipe
from tests.families import FAMILIES
from tests.tiny import TINY_CONFIG, make_checkpoint
from torchweave_ray.errors import ArtifactError
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import read_manifest
from torchweave_ray.sampling_params import SamplingParams

EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WHOLE = {
    "gemma3": ("Gemma3ForConditionalGeneration", {**EYES, "model_type": "siglip_vision_model"}),
    "mistral": ("Mistral3ForConditionalGeneration", {**EYES, "model_type": "pixtral"}),
}


def _checkpoint(folder: Path, family: str) -> Any:
    """As transformers saves it, with the tiny tokenizer; the model beside it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    make_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    text = {k: v for k, v in {**TINY_CONFIG, **FAMILIES[family]}.items() if k != "architectures"}
    architecture, eyes = WHOLE[family]
    model_type = architecture.removesuffix("ForConditionalGeneration").lower()
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=eyes)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", WHOLE)
def test_greedy_ids_are_those_of_the_whole(tmp_path: Path, family: str) -> None:
    source = tmp_path / "source"
    model = _checkpoint(source, family)
    prompts = [[3 + 7 * i % 290 for i in range(n)] for n in (5, 40)]
    wanted = [
        model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        for p in prompts
    ]
    artifact = optimize(Recipe("m", str(source), dtype="float32", verify="none"), tmp_path / "a")
    assert read_manifest(artifact).architecture == FAMILIES[family]["architectures"][0]
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(artifact, max_model_len=128, runner={"executor": "torch"}) as llm:
        said = [list(c.token_ids) for c in llm.generate(prompts, greedy)]
    assert said == [ids[0, len(p) :].tolist() for p, ids in zip(prompts, wanted, strict=True)]


def test_names_and_keys_as_they_are_published(tmp_path: Path) -> None:
    """Under another prefix, and with a text_config that says what is not usual only."""
    _checkpoint(tmp_path, "gemma3")
    before = open_checkpoint(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    moved = {
        "model." + k.replace("language_model.model.", "language_model."): v for k, v in held.items()
    }
    save_file(moved, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rms_norm_eps", "attention_bias", "hidden_act"):
        del config["text_config"][key]
    config["eos_token_id"] = [1, 106]
    (tmp_path / "config.json").write_text(json.dumps(config))
    after = open_checkpoint(tmp_path)
    assert dict(after.tensors) == dict(before.tensors)
    norm = held["language_model.model.norm.weight"]
    assert torch.equal(after.load("model.norm.weight"), norm)
    values = json.loads(after.documents()["config.json"])
    assert (values["rms_norm_eps"], values["eos_token_id"]) == (1e-6, [1, 106])
    del config["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="text_config = None must be an object"):
        open_checkpoint(tmp_path)
