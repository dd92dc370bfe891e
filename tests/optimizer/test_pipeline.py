"""A Hugging Face folder becomes an artifact: its content, repeats, edits, damage and refusals."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimizer.pipeline import optimize
from optimizer.recipe import Recipe
from tests.optimizer.conftest import Recorder
from tests.tiny import CHAT_TEMPLATE, make_checkpoint, make_tiny_artifact
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import read_manifest, verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.weights import load_weights

CPU = torch.device("cpu")


def _weights(artifact: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return load_weights(artifact, ModelConfig.read(artifact), dtype, CPU)


def _equal(left: Path, right: Path) -> bool:
    a, b = _weights(left), _weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_artifact_holds_the_fused_model(tmp_path: Path, source: Path) -> None:
    store = tmp_path / "store"
    artifact = optimize(source, store)
    manifest = verify_artifact(artifact, full=True)
    assert artifact == store / f"tiny-{manifest.artifact_id}"
    assert (store / "tiny").resolve() == artifact
    assert (manifest.dtype, manifest.layout) == ("float32", "fused")
    assert manifest.source == str(source)
    assert _equal(artifact, make_tiny_artifact(tmp_path / "direct", num_hidden_layers=1))
    settings = json.loads((artifact / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHAT_TEMPLATE
    assert (artifact / "config.json").read_bytes() == (source / "config.json").read_bytes()
    report = json.loads((artifact / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert list(stages) == [
        "fetch",
        "convert",
        "fuse",
        "quantize",
        "pack",
        "verify",
        "tune",
        "seal",
    ]
    assert all(stage["num_bytes"] > 0 and stage["seconds"] > 0 for stage in stages.values())
    assert list((store / ".work").iterdir()) == []


def test_a_sharded_folder_gives_the_same_weights(tmp_path: Path, source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    sharded = shutil.copytree(source, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        shards["ab"[index % 2] + ".safetensors"][name] = tensor
    for file, part in shards.items():
        save_file(part, sharded / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index_file = sharded / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    first, second = optimize(source, tmp_path / "s"), optimize(sharded, tmp_path / "s")
    name = "model.safetensors"
    assert read_manifest(first).files[name] == read_manifest(second).files[name]
    (sharded / "b.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"b\.safetensors is missing"):
        optimize(sharded, tmp_path / "s")


def test_a_template_file_goes_into_the_tokenizer_config(tmp_path: Path, source: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ 'é' }}")
    artifact = optimize(source, tmp_path / "store")
    settings = json.loads((artifact / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ 'é' }}"
    assert settings["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "bfloat16"),
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.bfloat16, "float32", "float32"),
    ],
)
def test_dtypes(tmp_path: Path, source: Path, stored: Any, dtype: Any, expected: str) -> None:
    path = source / "model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)
    artifact = optimize(Recipe("t", str(source), dtype=dtype), tmp_path / "store")
    assert read_manifest(artifact).dtype == expected
    wanted = getattr(torch, expected)
    embed = _weights(artifact, wanted)["embed.weight"]
    assert torch.equal(embed, tensors["model.embed_tokens.weight"].to(wanted))
    held = load_file(artifact / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {wanted}


def test_a_second_run_does_nothing(tmp_path: Path, source: Path) -> None:
    first = optimize(source, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    recorder = Recorder()
    assert optimize(source, tmp_path / "store", recorder) == first
    assert recorder.started == []
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_an_edited_source_is_staged_anew_and_the_link_turns(tmp_path: Path, source: Path) -> None:
    store = tmp_path / "store"
    first = optimize(source, store)
    make_checkpoint(source, seed=1, num_hidden_layers=1)
    second = optimize(source, store)
    assert first != second
    assert (store / "tiny").resolve() == second
    assert verify_artifact(first, full=True).artifact_id in first.name
    make_checkpoint(source, num_hidden_layers=1)
    assert optimize(source, store) == first
    assert (store / "tiny").resolve() == first


def test_a_deleted_artifact_is_staged_again_with_the_same_id(tmp_path: Path, source: Path) -> None:
    first = optimize(source, tmp_path / "store")
    shutil.rmtree(first)
    assert optimize(source, tmp_path / "store") == first
    assert optimize(source, tmp_path / "other").name == first.name


def test_staging_an_artifact_again_renews_its_report(tmp_path: Path, source: Path) -> None:
    first = optimize(Recipe("t", str(source)), tmp_path / "store")
    before = (first / "model.safetensors").stat().st_ino
    assert optimize(Recipe("t", str(source), verify="none"), tmp_path / "store") == first
    assert (first / "model.safetensors").stat().st_ino == before
    assert json.loads((first / "report.json").read_text())["quality"] is None


def test_a_moved_source_gives_the_same_id(tmp_path: Path, source: Path) -> None:
    first = optimize(Recipe("t", str(source)), tmp_path / "a")
    moved = source.rename(tmp_path / "elsewhere")
    assert optimize(Recipe("t", str(moved)), tmp_path / "b").name == first.name
    assert optimize(Recipe("t", str(moved)), tmp_path / "a") == first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_byte_is_refused_by_file(tmp_path: Path, source: Path, name: str) -> None:
    artifact = optimize(source, tmp_path / "store")
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} was altered"):
        verify_artifact(artifact)
    with pytest.raises(ArtifactError, match=rf"{name} was altered.*delete .* to stage"):
        optimize(source, tmp_path / "store")


def test_a_full_disk_leaves_the_old_artifact_and_the_next_run_goes_on(
    tmp_path: Path, source: Path
) -> None:
    class FullDisk(Recorder):
        def advance(self, num_bytes: int) -> None:
            if self.started[-1] == "fuse":
                raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    store = tmp_path / "store"
    first = optimize(source, store)
    make_checkpoint(source, seed=1, num_hidden_layers=1)
    with pytest.raises(ArtifactError, match=r"No space left on device \(model\.safetensors\)"):
        optimize(source, store, FullDisk())
    assert (store / "tiny").resolve() == first
    verify_artifact(first, full=True)
    recorder = Recorder()
    optimize(source, store, recorder)
    assert recorder.started == ["fuse", "quantize", "pack", "verify", "tune", "seal", "publish"]


def test_the_pin_is_held(tmp_path: Path, source: Path) -> None:
    digest = read_manifest(optimize(source, tmp_path / "a")).source_sha256
    optimize(Recipe("t", str(source), sha256=digest), tmp_path / "b")
    with pytest.raises(ArtifactError, match=f"has sha256 {digest}, the recipe pins 0000"):
        optimize(Recipe("t", str(source), sha256="0" * 64), tmp_path / "c")
    assert not list((tmp_path / "c").glob("t*"))


def test_something_in_the_way_of_the_link(tmp_path: Path, source: Path) -> None:
    (tmp_path / "store" / "tiny").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="is in the way"):
        optimize(source, tmp_path / "store")


def test_the_default_store(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARTIFACT_DIR", raising=False)
    assert optimize(source).parent == tmp_path / "artifacts"
    monkeypatch.setenv("ARTIFACT_DIR", str(tmp_path / "set"))
    assert optimize(source).parent == tmp_path / "set"


def _config(**changes: Any) -> Any:
    def break_it(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return break_it


def _tensor(name: str, tensor: torch.Tensor | None) -> Any:
    def break_it(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors.pop(name, None)
        path.unlink()
        save_file(tensors | ({} if tensor is None else {name: tensor}), path)

    return break_it


def _cut(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (_config(architectures=["FalconForCausalLM"]), "FalconForCausalLM"),
        (_config(sliding_window=128), "sliding_window"),
        (_config(quantization_config={"bits": 4}), "quantization_config"),
        (_config(vocab_size=200), r"shape \[300, 64\]"),
        (_tensor("model.norm.weight", None), "model.norm.weight is missing"),
        (_tensor("model.extra.weight", torch.zeros(2)), "model.extra.weight"),
        (_tensor("model.norm.weight", torch.zeros(3)), r"model.norm.weight has shape \[3\]"),
        (_tensor("model.norm.weight", torch.zeros(64, dtype=torch.int8)), "quantised already"),
        (lambda f: (f / "model.safetensors").unlink(), "only safetensors weights"),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (_cut("model.safetensors"), r"model\.safetensors cannot be read"),
        (_cut("tokenizer.json"), r"tokenizer\.json cannot be read"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    tmp_path: Path, source: Path, break_it: Any, says: str
) -> None:
    break_it(source)
    with pytest.raises(ArtifactError, match=says):
        optimize(source, tmp_path / "store")
    assert not list((tmp_path / "store").glob("tiny*"))


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny", vocab_size=299)
    with pytest.raises(ArtifactError, match="token id 299, the embedding only 299 rows"):
        optimize(source, tmp_path / "store")
