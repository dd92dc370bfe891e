"""A draft model is named as any model is: a replica and the commands find or stage its artifact."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.app import _with_absolute_draft
from deployments.args import ModelArgs
from deployments.placement import Placement, ReplicaConfig
from deployments.staging import load_served
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.cli.artifact import read_engine_config
from torchweave_ray.models.artifact import read_manifest


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("served") / "tiny")


@pytest.mark.parametrize("is_staged", [True, False])
def test_a_replica_stages_it(
    is_staged: bool, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARTIFACT_MODEL_DIR", str(served))  # speaks of the served model only
    make = make_tiny_artifact if is_staged else make_checkpoint
    draft = make(tmp_path / "draft", num_hidden_layers=1)
    speculation = {"method": "draft", "model": str(draft)}
    model = ModelArgs(id="m", artifact=str(served), engine={"speculation": speculation})
    config = ReplicaConfig(model, Placement(1, 0, 1), str(tmp_path / "store"))
    engine = config.engine_config(1)
    loaded = load_served(config, engine, served, None)
    assert loaded.draft is not None
    assert loaded.draft.runner.limits.num_blocks == loaded.runner.limits.num_blocks
    assert 0.2 < loaded.draft.share < 0.9
    assert loaded.startup_s["draft_weights"] > 0


def test_the_commands_stage_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARTIFACT_DIR", str(tmp_path / "store"))
    draft = make_checkpoint(tmp_path / "draft", num_hidden_layers=1)
    (tmp_path / "engine.yaml").write_text(f"speculation: {{method: draft, model: {draft}}}\n")
    found = read_engine_config(tmp_path / "engine.yaml").speculation.model
    assert found is not None
    assert read_manifest(Path(found)).architecture == "LlamaForCausalLM"


def test_a_folder_means_the_same_on_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    for name, wanted in (("small", str(tmp_path / "small")), ("smollm2-135m-int4",) * 2):
        speculation = {"method": "draft", "model": name}
        assert _with_absolute_draft({"speculation": speculation})["speculation"]["model"] == wanted
    assert _with_absolute_draft({}) == {}
