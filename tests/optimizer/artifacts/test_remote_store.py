"""Artifacts on shared storage: fetched and checked, uploaded whole, refused when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from optimizer.pipeline import optimize
from optimizer.recipe import Recipe
from optimizer.remote_store import RemoteStore, open_places
from optimizer.store import Store
from optimizer.task import ensure_staged
from tests.optimizer.conftest import Recorder
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import MANIFEST, REPORT, WEIGHTS, verify_artifact


@pytest.fixture
def recipe(source: Path) -> Recipe:
    return Recipe("tiny", str(source), verify="none")


@pytest.fixture(params=["memory", "file", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield "memory://bucket/models"
        files = fsspec.filesystem("memory")
        files.store.clear()
        files.pseudo_dirs[:] = [""]
    else:
        folder = tmp_path / "shared place"
        yield f"file://{folder}" if request.param == "file" else str(folder)


def test_what_one_node_stages_another_fetches(tmp_path: Path, recipe: Recipe, place: str) -> None:
    first, second = Recorder(), Recorder()
    staged = optimize(recipe, place, first, tmp_path / "a")
    assert first.started[-2:] == ["publish", "upload"]
    fetched = optimize(recipe, place, second, tmp_path / "b")
    assert second.started == ["download"]
    assert fetched.name == staged.name
    for name in (*verify_artifact(fetched, full=True).files, MANIFEST, REPORT):
        assert (fetched / name).read_bytes() == (staged / name).read_bytes()
    assert {p.name for p in fetched.iterdir()} <= {p.name for p in staged.iterdir()}
    assert (tmp_path / "b" / "tiny").resolve() == fetched
    assert list((tmp_path / "b" / ".work").iterdir()) == []
    again = Recorder()
    assert optimize(recipe, place, again, tmp_path / "b") == fetched
    assert again.started == []


def test_replicas_take_recipes_and_artifacts_from_there(
    tmp_path: Path, recipe: Recipe, place: str
) -> None:
    staged = optimize(recipe, place, None, tmp_path / "a")
    assert ensure_staged(recipe, place, cache=tmp_path / "b").parent == tmp_path / "b"
    if "://" in place:
        url = f"{place}/{staged.name}"
        held = ensure_staged(recipe, model_dir=url, cache=tmp_path / "c")
        assert held == tmp_path / "c" / staged.name
        with pytest.raises(ArtifactError, match=r"no artifact at .*/nothing: it has no manifest"):
            ensure_staged(recipe, model_dir=f"{place}/nothing", cache=tmp_path / "c")


@pytest.fixture
def shared(tmp_path: Path, recipe: Recipe) -> Path:
    """The uploaded artifact."""
    staged = optimize(recipe, f"file://{tmp_path}/shared", None, tmp_path / "a")
    return tmp_path / "shared" / staged.name


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", REPORT])
def test_what_comes_damaged_is_refused(
    tmp_path: Path, recipe: Recipe, shared: Path, name: str
) -> None:
    data = bytearray((shared / name).read_bytes())
    data[len(data) // 2] ^= 1
    (shared / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"came damaged from file://.*{name} (was|cannot)"):
        optimize(recipe, f"file://{shared.parent}", None, tmp_path / "b")
    assert not list((tmp_path / "b").glob("tiny*"))


def test_an_upload_that_was_killed_is_not_seen_and_is_done_again(
    tmp_path: Path, recipe: Recipe, shared: Path
) -> None:
    (shared / MANIFEST).unlink()
    (shared / WEIGHTS).write_bytes(b"half")
    recorder = Recorder()
    assert optimize(recipe, f"file://{shared.parent}", recorder, tmp_path / "b").exists()
    assert recorder.started[0] == "fetch", "staged here: there is nothing whole to take"
    assert recorder.started[-1] == "upload"
    verify_artifact(shared, full=True)
    shutil.rmtree(shared.parent)
    recorder = Recorder()
    optimize(recipe, f"file://{shared.parent}", recorder, tmp_path / "b")
    assert recorder.started == ["upload"], "what a node has goes back to a store that lost it"
    verify_artifact(shared, full=True)


def test_an_edited_local_source_is_not_taken_from_there(
    tmp_path: Path, recipe: Recipe, shared: Path
) -> None:
    make_checkpoint(Path(recipe.source), seed=1, num_hidden_layers=1)
    staged = optimize(recipe, f"file://{shared.parent}", None, tmp_path / "b")
    assert staged.name != shared.name
    assert len(list(shared.parent.glob("tiny-*"))) == 2


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "file").write_text("in the way")
    url = f"file://{tmp_path}/file"
    with pytest.raises(ArtifactError, match=rf"cannot \w+ {url}/.*: NotADirectoryError"):
        optimize(recipe, url, None, tmp_path / "b")
    missing = "nosuchprotocol://user:secret@host/models"
    with pytest.raises(ArtifactError, match="nosuchprotocol://host/models") as caught:
        optimize(recipe, missing, None, tmp_path / "b")
    assert "secret" not in str(caught.value)


def test_an_index_of_nonsense_is_no_artifact(tmp_path: Path, recipe: Recipe, shared: Path) -> None:
    (index,) = (shared.parent / ".index").iterdir()
    values: list[Any] = [[], {"artifact": 3}, {"artifact": "gone", "identity": recipe.identity()}]
    remote = RemoteStore(f"file://{shared.parent}")
    assert remote.find(index.stem, recipe.identity()) == shared.name
    for value in values:
        index.write_text(json.dumps(value))
        assert remote.find(index.stem, recipe.identity()) is None


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ARTIFACT_DIR", raising=False)
    monkeypatch.delenv("ARTIFACT_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert open_places(None, None) == (Store(tmp_path / "artifacts"), None)
    local, remote = open_places("s3://bucket/models", None)
    assert local.root == tmp_path / ".cache" / "torchweave" / "artifacts"
    assert remote is not None
    assert remote.url == "s3://bucket/models"
    monkeypatch.setenv("ARTIFACT_DIR", "gs://bucket")
    monkeypatch.setenv("ARTIFACT_CACHE_DIR", "~/cache")
    local, remote = open_places(None, None)
    assert local.root == tmp_path / "cache"
    assert remote is not None
    assert remote.url == "gs://bucket"
