"""`torchweave batch --workers`: Ray Data, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.batch.test_batch import BAD, GOOD, completion, results, run, write
from tests.tiny import make_tiny_artifact
from torchweave_ray.cli.app import build_app


def test_without_ray_data_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    artifact = make_tiny_artifact(tmp_path / "tiny")
    source = write(tmp_path / "in.jsonl", completion("a"))
    args = ["batch", str(source), str(tmp_path / "out"), "--workers", "1", "--model", str(artifact)]
    ran = CliRunner().invoke(build_app(), args)
    assert "pip install 'torchweave-ray[batch]'" in str(ran.exception)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_give_what_one_engine_gives(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="Ray Data is not installed")
    pytest.importorskip("pyarrow", reason="Ray Data is not installed")
    import ray

    artifact = make_tiny_artifact(tmp_path / "tiny")
    engine = "{max_model_len: 256, cache: {kv_memory: 4194304}, runner: {threads: 1}}"
    (tmp_path / "engine.yaml").write_text(engine)
    many = [completion(f"{i}", seed=i) for i in range(80)]
    source = write(tmp_path / "in.jsonl", *(each for each, _ in BAD), *GOOD, *many)
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
    try:
        ran = run(artifact, source, tmp_path / "by-ray.jsonl", "--workers", "2")
    finally:
        ray.shutdown()
    assert ran.exit_code == 0, ran.output
    assert run(artifact, source, tmp_path / "here.jsonl").exit_code == 0
    by_ray, here = results(tmp_path / "by-ray.jsonl"), results(tmp_path / "here.jsonl")
    assert [each["id"] for each in by_ray] == [each["id"] for each in here]
    assert [each["error"] for each in by_ray] == [each["error"] for each in here]
    assert json.dumps([each["response"]["body"]["choices"] for each in by_ray[-80:]]) == json.dumps(
        [each["response"]["body"]["choices"] for each in here[-80:]]
    )
