"""LoRA adapters merged into a model: PEFT's own arithmetic, the artifact's id, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimizer.pipeline import optimize
from optimizer.recipe import Recipe, load_recipe
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.models.artifact import read_manifest

DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
SHAPES = {DOWN: (64, 128), Q: (64, 64), V: (32, 64)}


def make_adapter(
    folder: Path,
    modules: tuple[str, ...] = (Q, DOWN),
    ranks: dict[str, int] | None = None,
    seed: int = 0,
    tensors: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A folder as PEFT's `save_pretrained` leaves it. `tensors`: further ones."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    held = {}
    for module in modules:
        rank = (ranks or {}).get(module, 4)
        n, k = SHAPES[module]
        a = torch.randn(rank, k, generator=generator)
        b = torch.randn(n, rank, generator=generator)
        held[f"base_model.model.{module}.lora_A.weight"] = a / 10
        held[f"base_model.model.{module}.lora_B.weight"] = b / 10
    save_file(held | (tensors or {}), folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    values = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        "bias": "none",
        "init_lora_weights": True,
        "peft_version": "0.21.2",
        "lora_dropout": 0.1,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def _recipe(tmp_path: Path, source: Path, adapters: Any, **keys: Any) -> Recipe:
    path = tmp_path / "merged.yaml"
    path.write_text(
        json.dumps({"source": str(source), "adapters": adapters, "verify": "none"} | keys)
    )
    return load_recipe(path)


def _merged(source: Path, adapter: Path, module: str, scale: float) -> Tensor:
    held = load_file(adapter / "adapter_model.safetensors")
    a, b = (held[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    weight = load_file(source / "model.safetensors")[f"{module}.weight"].double()
    return (weight + scale * b @ a).float()


def test_two_adapters_are_added_in_fp32(tmp_path: Path, source: Path) -> None:
    first = make_adapter(tmp_path / "a", ranks={DOWN: 2}, rank_pattern={"down_proj": 2})
    second = make_adapter(tmp_path / "b", (Q, V), use_rslora=True, alpha_pattern={V: 3}, seed=1)
    adapters = ["a", {"source": "b", "scale": -0.5}]
    artifact = optimize(_recipe(tmp_path, source, adapters, verify="auto"), tmp_path / "store")
    held = load_file(artifact / "model.safetensors")
    down = _merged(source, first, DOWN, 8 / 2)
    assert torch.equal(held["layers.0.down_proj.weight"], down)
    q, _, v = held["layers.0.qkv_proj.weight"].split([64, 32, 32])
    assert torch.equal(v, _merged(source, second, V, -0.5 * 3 / math.sqrt(4)))
    base = load_file(source / "model.safetensors")[f"{Q}.weight"]
    once = _merged(source, first, Q, 8 / 4)
    both = once + (_merged(source, second, Q, -0.5 * 8 / math.sqrt(4)) - base)
    torch.testing.assert_close(q, both, rtol=1e-5, atol=1e-6)
    # The merged model is what `verify` compared with: staged in fp32 it is the same.
    report = json.loads((artifact / "report.json").read_text())
    assert report["quality"]["top1"] == 1.0
    assert set(report["source"]["adapters"][0]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_what_the_id_covers(tmp_path: Path, source: Path) -> None:
    make_adapter(tmp_path / "a")
    store = tmp_path / "store"
    plain = optimize(Recipe("merged", str(source), verify="none"), store)
    merged = optimize(_recipe(tmp_path, source, ["a"]), store)
    assert read_manifest(merged).recipe["adapters"][0]["scale"] == 1.0
    digest = read_manifest(merged).recipe["adapters"][0]["sha256"]
    pinned = _recipe(tmp_path, source, [{"source": "a", "scale": 1, "sha256": digest}])
    assert optimize(pinned, store) == merged
    half = optimize(_recipe(tmp_path, source, [{"source": "a", "scale": 0.5}]), store)
    assert len({plain, merged, half}) == 3
    wrong = _recipe(tmp_path, source, [{"source": "a", "sha256": "0" * 64}])
    with pytest.raises(ArtifactError, match=f"has sha256 {digest}, the recipe pins 0000"):
        optimize(wrong, store)
    # An adapter that was edited is merged anew.
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    assert read_manifest(optimize(_recipe(tmp_path, source, ["a"]), store)).files == (
        read_manifest(half).files
    )


def test_merged_weights_are_quantised(tmp_path: Path, source: Path) -> None:
    make_adapter(tmp_path / "a", (DOWN,))
    recipe = _recipe(tmp_path, source, ["a"], quantization="int8")
    plain = Recipe("t", str(source), quantization=recipe.quantization, verify="none")
    merged, bare = (optimize(r, tmp_path / "store") for r in (recipe, plain))
    name = "layers.0.down_proj.weight"
    held, other = (load_file(a / "model.safetensors") for a in (merged, bare))
    assert not torch.equal(held[name], other[name])
    assert torch.equal(held["layers.0.o_proj.weight"], other["layers.0.o_proj.weight"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not 'LORA'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*changes the base"),
        ({"r": 8}, r"lora_A \[4, 128\] and lora_B \[64, 4\], adapter_config.json says rank 8"),
        ({"lora_alpha": None}, "lora_alpha must be a number above 0, got None"),
        ({"target_modules": ["q_proj"]}, "module .*down_proj is none of target_modules"),
        ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "'o_proj' has no tensors"),
        ({"rank_pattern": {"(a+)+": 2}}, r"'\(a\+\)\+' is not a module's name"),
        ({"tensors": {"base_model.model.x.lora_A.weight": torch.ones(4, 2)}}, "x has only lora_A"),
        (
            {"tensors": {"base_model.model.x.bias": torch.ones(2)}},
            r"tensor base_model.model.x.bias",
        ),
    ],
)
def test_what_is_not_merged_is_refused_by_name(
    tmp_path: Path, source: Path, changes: dict[str, Any], says: str
) -> None:
    make_adapter(tmp_path / "a", **changes)
    with pytest.raises(ArtifactError, match=says):
        optimize(_recipe(tmp_path, source, ["a"]), tmp_path / "store")


def _pair(module: str, n: int, k: int) -> dict[str, Tensor]:
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": torch.ones(4, k),
        f"{prefix}.lora_B.weight": torch.ones(n, 4),
    }


@pytest.mark.parametrize(
    ("module", "shape", "says"),
    [
        (
            "model.layers.7.self_attn.q_proj",
            (64, 64),
            r"changes model.layers.7.self_attn.q_proj.weight, the model has none; did you mean",
        ),
        ("model.layers.0.self_attn.k_proj", (64, 64), r"is \[64, 64\], the model's \[32, 64\]"),
    ],
)
def test_a_module_that_the_model_has_not(
    tmp_path: Path, source: Path, module: str, shape: tuple[int, int], says: str
) -> None:
    make_adapter(tmp_path / "a", tensors=_pair(module, *shape), target_modules="all-linear")
    with pytest.raises(ArtifactError, match=says):
        optimize(_recipe(tmp_path, source, ["a"]), tmp_path / "store")


def test_a_tied_head_is_not_changed_apart(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    copy = weights["model.embed_tokens.weight"].clone()
    (source / "model.safetensors").unlink()
    save_file(weights | {"lm_head.weight": copy}, source / "model.safetensors")
    head = _pair("lm_head", 300, 64)
    make_adapter(tmp_path / "a", tensors=head, target_modules="all-linear")
    with pytest.raises(ArtifactError, match=r"changes lm_head\.weight, which this model does not"):
        optimize(_recipe(tmp_path, source, ["a"]), tmp_path / "store")


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        ("a", "adapters must be a list"),
        ([{"scale": 1}], "each one needs a source"),
        (
            [{"source": "org/a", "scael": 1}],
            "unknown key 'scael' in adapters; did you mean 'scale'",
        ),
        ([{"source": "org/a", "scale": 0}], "scale must be a number other than 0"),
        ([{"source": "org/a", "scale": "x"}], "scale must be a number"),
        ([{"source": "org/a", "sha256": "x"}], "sha256 must be 64"),
        ([{"source": 3}], "source must be text"),
        (["./none"], "no folder"),
    ],
)
def test_wrong_recipes(tmp_path: Path, source: Path, adapters: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _recipe(tmp_path, source, adapters)


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_is_the_judge(tmp_path: Path, rslora: bool) -> None:
    """PEFT makes, saves and merges an adapter; ours is the same to fp32's last digits."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    source = make_checkpoint(tmp_path / "tiny")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        rank_pattern={"model.layers.1.self_attn.k_proj": 2},
        alpha_pattern={"down_proj": 5},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), config)
    model.save_pretrained(tmp_path / "a")
    artifact = optimize(_recipe(tmp_path, source, ["a"]), tmp_path / "store")
    held = load_file(artifact / "model.safetensors")
    merged = dict(model.merge_and_unload().named_parameters())
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        qkv = [merged[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
        got = held[f"layers.{layer}.qkv_proj.weight"]
        torch.testing.assert_close(got, torch.cat(qkv), rtol=1e-6, atol=1e-6)
        down = merged[f"{prefix}.mlp.down_proj.weight"]
        got = held[f"layers.{layer}.down_proj.weight"]
        torch.testing.assert_close(got, down.data, rtol=1e-6, atol=1e-6)
        up = merged[f"{prefix}.mlp.up_proj.weight"]
        assert torch.equal(held[f"layers.{layer}.gate_up_proj.weight"][128:], up)
