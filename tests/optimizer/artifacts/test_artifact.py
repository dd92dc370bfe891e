"""The format: its schema, its hashes of itself, what is refused, older and newer versions."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from optimizer.pipeline import optimize
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.errors import ArtifactError
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import (
    MANIFEST,
    MANIFEST_SCHEMA,
    REPORT,
    SEAL,
    Manifest,
    claim_artifact,
    hold_artifact,
    read_report,
    verify_artifact,
)
from torchweave_ray.models.artifact.manifest import compute_artifact_id


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    return optimize(make_checkpoint(folder / "tiny", num_hidden_layers=1), folder / "store")


@pytest.fixture
def artifact(staged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(staged, tmp_path / "artifact")


@pytest.mark.parametrize(
    "recipe",
    ["dtype: float32", "dtype: bfloat16", "quantization: int4", "layout: fused\ndtype: bfloat16"],
)
def test_every_manifest_follows_the_schema(tmp_path: Path, recipe: str) -> None:
    source = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"source: {source}\n{recipe}\nverify: none\n")
    values = json.loads((optimize(file, tmp_path / "store") / MANIFEST).read_text())
    schema = json.loads(MANIFEST_SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    judge.validate(values)
    assert set(schema["required"]) == set(values)
    for name in schema["required"]:
        assert not judge.is_valid({k: v for k, v in values.items() if k != name})
    assert not judge.is_valid({**values, "more": 1})
    assert not judge.is_valid({**values, "files": {"../x": values["files"]["config.json"]}})


def test_bits_that_flip_anywhere_are_refused(artifact: Path) -> None:
    verify_artifact(artifact, full=True)
    draw = random.Random(0)
    files = [path for path in sorted(artifact.iterdir()) if path.name != SEAL]
    assert {MANIFEST, REPORT} < {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        count = 200 if path.name == MANIFEST else 20
        for offset in {draw.randrange(len(whole)) for _ in range(count)} | {0, len(whole) - 1}:
            data = bytearray(whole)
            data[offset] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            with pytest.raises(ArtifactError, match=str(path)):
                verify_artifact(artifact, full=True)
        path.write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match=str(path)):
            verify_artifact(artifact, full=True)
        path.write_bytes(whole)
    verify_artifact(artifact, full=True)


def test_a_change_that_keeps_size_and_time_is_seen_by_a_full_check_only(artifact: Path) -> None:
    path = artifact / "model.safetensors"
    verify_artifact(artifact)
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    verify_artifact(artifact)
    with pytest.raises(ArtifactError, match=r"model\.safetensors was altered"):
        verify_artifact(artifact, full=True)


def test_missing_files_are_named(artifact: Path) -> None:
    for name in verify_artifact(artifact).files:
        (artifact / name).rename(artifact / "away")
        for full in (False, True):
            with pytest.raises(ArtifactError, match=rf"{name} is missing"):
                verify_artifact(artifact, full=full)
        (artifact / "away").rename(artifact / name)


def _signed_anew(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """What somebody writes who hashes again what he has changed."""

    def edit(text: str) -> str:
        values = json.loads(text)
        del values["manifest_sha256"]
        manifest = Manifest.from_json(text, "")
        change(values)
        values["files"] = {name: manifest.files[name] for name in values["files"]}
        return Manifest(**values).to_json()

    return edit


def _plain(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_plain(lambda m: m.update(format_version=3)), "version 3 is newer than 2.*upgrade"),
        (_plain(lambda m: m.update(format_version=0)), "version 0 is not one.*stage the model ag"),
        (_plain(lambda m: m.update(format_version="2")), "version '2' is not one"),
        (_plain(lambda m: m.update(dtype="float16")), "altered.*manifest_sha256"),
        (_plain(lambda m: m.pop("manifest_sha256")), "altered.*manifest_sha256"),
        (lambda text: text.replace("\n", "\r\n"), "altered.*manifest_sha256"),
        (_plain(lambda m: (m.pop("manifest_sha256"), m.update(format_version=1))), "has the id"),
        (_signed_anew(lambda m: m.update(source_sha256="0" * 64)), "has the id"),
        (lambda text: "[]", "not a manifest"),
        (lambda text: "{}", "not a manifest"),
        (lambda text: text[:100], "not a manifest"),
    ],
)
def test_a_manifest_that_is_not_its_own_is_refused(
    artifact: Path, edit: Callable[[str], str], says: str
) -> None:
    path = artifact / MANIFEST
    path.write_text(edit(path.read_text()))
    with pytest.raises(ArtifactError, match=f"(?s)manifest.json.*{says}"):
        verify_artifact(artifact)


def test_the_older_format_is_read(artifact: Path) -> None:
    path = artifact / MANIFEST
    values = json.loads(path.read_text())
    files = Manifest.from_json(path.read_text(), "").files
    old = compute_artifact_id(values["source_sha256"], values["recipe"], files, 1)
    del values["manifest_sha256"]
    values |= {"format_version": 1, "artifact_id": old}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    (artifact / REPORT).write_text("{}")
    assert verify_artifact(artifact, full=True).artifact_id == old
    with LLM(artifact, max_model_len=64) as llm:
        assert llm.info.artifact_id == old


def test_a_file_name_cannot_lead_out_of_the_folder(artifact: Path) -> None:
    manifest = verify_artifact(artifact)
    entry = manifest.files["config.json"]
    for name in ("../config.json", "a/b", "..", ".seal.json"):
        (artifact / MANIFEST).write_text(
            Manifest.from_json((artifact / MANIFEST).read_text(), "")
            .to_json()
            .replace('"config.json"', json.dumps(name))
        )
        with pytest.raises(ArtifactError):
            verify_artifact(artifact)
        bad = Manifest("", "", "", "", "", "", {name: entry}).to_json()
        with pytest.raises(ArtifactError, match="cannot be a file of an artifact"):
            Manifest.from_json(bad, "m")
        (artifact / MANIFEST).write_text(manifest.to_json())


def test_an_altered_report_costs_its_settings_only(
    artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_report(artifact)["tuning"]
    path = artifact / REPORT
    path.write_text(path.read_text().replace('"name": "fetch"', '"name": "fetched"'))
    verify_artifact(artifact)
    assert read_report(artifact) == {}
    assert "report.json was altered" in caplog.text


def test_who_uses_an_artifact_holds_it(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny")
    first, second = hold_artifact(artifact), hold_artifact(artifact)
    assert claim_artifact(artifact) is None
    first.release()
    assert claim_artifact(artifact) is None
    del second
    with LLM(artifact, max_model_len=64):
        assert claim_artifact(artifact) is None
    claim = claim_artifact(artifact)
    assert claim is not None
    artifact.rename(tmp_path / "deleted")
    with pytest.raises(ArtifactError, match="may just have been deleted"):
        hold_artifact(artifact)
