"""Staging for a replica: directly without Ray, as a task on its node with Ray."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from optimizer.pipeline import optimize
from optimizer.progress import LogProgress
from optimizer.recipe import resolve_recipe
from optimizer.task import StagingTask, ensure_staged, stage_artifact, stage_on_cluster
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.models.artifact import read_report, verify_artifact


def test_without_ray_it_is_a_plain_call(tmp_path: Path, source: Path) -> None:
    staged = ensure_staged(str(source), tmp_path / "store")
    assert staged == stage_artifact(str(source), tmp_path / "store")
    assert staged == ensure_staged(resolve_recipe(source), str(tmp_path / "store"), full=True)


def test_a_model_dir_is_taken_as_it_is(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_tiny_artifact(tmp_path / "ready")
    link = tmp_path / "link"
    link.symlink_to(artifact)
    assert ensure_staged(str(source), tmp_path / "store", link) == artifact
    monkeypatch.setenv("ARTIFACT_MODEL_DIR", str(link))
    assert ensure_staged(str(source), tmp_path / "store") == artifact
    assert not (tmp_path / "store").exists()
    (artifact / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        ensure_staged(str(source))
    monkeypatch.setenv("ARTIFACT_MODEL_DIR", str(tmp_path / "nothing"))
    with pytest.raises(ArtifactError, match=r"no artifact in .*torchweave optimize"):
        ensure_staged(str(source))


def test_a_half_written_artifact_is_refused(tmp_path: Path, source: Path) -> None:
    staged = optimize(source, tmp_path / "store")
    weights = staged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors has \d+ bytes, the manifest says"):
        ensure_staged(str(source), tmp_path / "store")


@pytest.fixture
def ray_node() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_the_log_says_how_far_a_stage_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        progress = LogProgress(interval_s=0)
        progress.start("fetch")
        progress.expect(4_000_000)
        progress.advance(1_000_000)
        progress.finish("fetch", 1.0, False)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "[Optimizer] fetch ..."
    assert said[1].startswith("[Optimizer] fetch 1.0 of 4.0 MB, ")
    assert said[2] == "[Optimizer] fetch 1.0 s, 1.0 MB"


@pytest.mark.slow
@pytest.mark.ray
def test_a_task_whose_worker_dies_goes_on_in_another(tmp_path: Path, ray_node: Any) -> None:
    source = make_checkpoint(tmp_path / "tiny", num_hidden_layers=24, hidden_size=256)
    recipe = resolve_recipe(source)
    killed: list[int] = []

    def kill_once() -> None:
        marker = tmp_path / "store" / ".work"
        while not list(marker.glob("*/convert.done.json")):
            time.sleep(0.002)
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if b"ray::stage:tiny" in (folder / "cmdline").read_bytes():
                    killed.append(int(folder.name))
                    os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_once)
    killer.start()
    staged = ensure_staged(recipe, tmp_path / "store")
    killer.join()
    assert len(killed) == 1, "the task bears the recipe's name"
    stages = {stage["name"]: stage for stage in read_report(staged)["stages"]}
    assert stages["convert"]["resumed"], "the second worker went on"
    verify_artifact(staged, full=True)


def test_a_cluster_that_is_not_there_is_named_at_once(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        stage_on_cluster(str(source), None, None, "127.0.0.1:1", StagingTask())


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_stages_on_a_cluster(tmp_path: Path, source: Path, ray_node: Any) -> None:
    address = ray_node.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "torchweave_ray.cli", "optimize", str(source)]
    places = ["--store", str(tmp_path / "shared"), "--cache", str(tmp_path / "cache")]
    ran = subprocess.run(
        [*command, *places, "--ray", address], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    staged = Path(ran.stdout.strip())
    assert staged.parent == tmp_path / "cache"
    verify_artifact(tmp_path / "shared" / staged.name, full=True)
    assert "[Optimizer] pack ..." in ran.stderr


@pytest.mark.ray
def test_replicas_stage_by_a_task_on_their_node(
    tmp_path: Path, source: Path, ray_node: Any
) -> None:
    class Replica:
        def __init__(self, recipe: str, store: str) -> None:
            self.artifact = str(ensure_staged(recipe, store))

        def where(self) -> str:
            return self.artifact

    store = tmp_path / "store"
    actor = ray_node.remote(Replica)
    holding_the_cpu = actor.options(num_cpus=1).remote(str(source), str(store))
    another = actor.options(num_cpus=0).remote(str(source), str(store))
    places = ray_node.get([holding_the_cpu.where.remote(), another.where.remote()])
    assert places == [str(store / places[0])] * 2
    assert len([path for path in store.glob("tiny-*") if path.is_dir()]) == 1

    (source / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing") as caught:
        ensure_staged(str(source), store)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m'"):
        ensure_staged("smollm2-136m", store)
