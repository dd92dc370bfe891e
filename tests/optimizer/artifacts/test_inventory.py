"""`torchweave artifact`: what is shown, what differs, what gc deletes and what it never does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from optimizer.inventory import TRASH, collect, discard_unfinished, list_artifacts
from optimizer.pipeline import optimize
from optimizer.store import Store
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.cli.app import build_app
from torchweave_ray.models.artifact import (
    MANIFEST,
    WEIGHTS,
    Manifest,
    hold_artifact,
    verify_artifact,
)

DAY = 86_400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-<id> of seeds 0 to 4, a day between them, and one of another model."""
    root = tmp_path_factory.mktemp("store")
    for seed in range(5):
        _make(root, "tiny", seed)
    _make(root, "other-0123456789abcdef01234567", 0)
    (root / "notes").mkdir()
    return root


def _make(root: Path, model: str, seed: int) -> None:
    folder = make_tiny_artifact(root / f"new{seed}", seed=seed, num_hidden_layers=1)
    manifest = Manifest.from_json((folder / MANIFEST).read_text(), "")
    folder = folder.rename(root / f"{model}-{manifest.artifact_id}")
    os.utime(folder, (seed * DAY, seed * DAY))


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made, tmp_path / "store")
    return Store(tmp_path / "store")


def _run(*args: object) -> Result:
    return CliRunner().invoke(build_app(), ["artifact", *map(str, args)])


def _of(store: Store, model: str = "tiny") -> list[Path]:
    """Oldest first."""
    return [e.directory for e in list_artifacts(store) if e.model == model][::-1]


def test_gc_keeps_the_newest_the_linked_and_the_used(store: Store) -> None:
    first, second, third, fourth, fifth = _of(store)
    store.point("current", first)
    lease = hold_artifact(third)
    dry = _run("gc", "--keep", 1, "--store", store.root, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["freed_bytes"] > 0
    assert _of(store) == [first, second, third, fourth, fifth]
    result = json.loads(_run("gc", "--keep", 1, "--store", store.root, "--json").stdout)
    why = {Path(e["directory"]): (e["deleted"], e["why"]) for e in result["artifacts"]}
    assert why[first] == (False, "link current points to it")
    assert why[third] == (False, "a process uses it")
    assert why[second][0]
    assert why[fourth][0]
    assert _of(store) == [first, third, fifth]
    assert len(_of(store, "other-0123456789abcdef01234567")) == 1
    assert (store.root / "notes").is_dir()
    assert not (store.root / TRASH).exists()
    lease.release()
    assert "deleted" in _run("gc", "--keep", 0, "--store", store.root).stdout
    assert _of(store) == [first]


def test_an_artifact_that_another_process_maps_stays(store: Store) -> None:
    first = _of(store)[0]
    code = (
        "import sys; from torchweave_ray.llm import LLM\n"
        f"llm = LLM({str(first)!r}, max_model_len=64); print('mapped', flush=True)\n"
        "sys.stdin.read(); print(llm.generate('What')[0].token_ids, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdout is not None
        assert user.stdin is not None
        assert user.stdout.readline() == "mapped\n"
        collect(store, keep=1)
        assert _of(store)[0] == first
        user.stdin.close()
        assert user.stdout.readline().startswith("(")
    assert user.returncode == 0
    collect(store, keep=1)
    assert first not in _of(store)


def test_a_killed_gc_leaves_whole_artifacts_and_the_next_one_ends_it(store: Store) -> None:
    gone = 0
    for fatal in range(1, 60):
        child = os.fork()
        if child == 0:
            _die_at(fatal)
            collect(store, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for artifact in _of(store):
            verify_artifact(artifact, full=True)
        if not os.WIFSIGNALED(status):
            break
        gone += 1
    assert gone >= 10
    assert len(_of(store)) == 1
    assert not (store.root / TRASH).exists()


def _die_at(fatal: int) -> None:
    count = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_deleted_artifact_is_staged_anew(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    store = Store(tmp_path / "store")
    first = optimize(source, store.root)
    (store.root / "tiny").unlink()
    collect(store, keep=0)
    assert not first.exists()
    assert list((store.root / ".index").iterdir()) == []
    assert optimize(source, store.root) == first


def test_what_killed_runs_left_goes_when_asked(store: Store) -> None:
    (store.work("killed") / "file").write_bytes(b"123")
    store.work("running")
    with store.lock("running", lambda: None):
        assert discard_unfinished(store, dry_run=True) == [("killed", 3)]
        result = _run("gc", "--keep", 9, "--unfinished", "--json", "--store", store.root)
    assert json.loads(result.stdout)["unfinished"] == ["killed"]
    assert [path.name for path in (store.root / ".work").iterdir()] == ["running"]


def test_show(store: Store) -> None:
    store.point("tiny", _of(store)[-1])
    listed = json.loads(_run("show", "--store", store.root, "--json").stdout)["artifacts"]
    assert [e["model"] for e in listed] == ["other-0123456789abcdef01234567", *["tiny"] * 5]
    assert listed[1]["links"] == ["tiny"]
    assert listed[0]["artifact_id"] in _run("show", "--store", store.root).stdout
    for name in ("tiny", _of(store)[-1].name, listed[1]["artifact_id"][:12], _of(store)[-1]):
        shown = _run("show", name, "--store", store.root, "--json")
        manifest = json.loads(shown.stdout)["manifest"]
        assert manifest["artifact_id"] == listed[1]["artifact_id"]
    assert "LlamaForCausalLM" in _run("show", "tiny", "--store", store.root).stdout
    missing = _run("show", "nothing", "--store", store.root)
    assert missing.exit_code == 1
    assert "no artifact is called 'nothing'" in str(missing.exception)


def test_diff(store: Store) -> None:
    first, second = _of(store)[:2]
    same = _run("diff", first, first, "--json")
    assert (same.exit_code, json.loads(same.stdout)) == (0, {})
    other = _run("diff", first, second, "--json")
    assert other.exit_code == 1
    changed = json.loads(other.stdout)
    assert f"manifest.files.{WEIGHTS}.sha256" in changed
    assert "manifest.files.config.json.sha256" not in changed
    assert "source_sha256" in _run("diff", first, second).stdout


def test_verify(store: Store) -> None:
    artifact = _of(store)[0]
    whole = _run("verify", artifact, "--json")
    assert json.loads(whole.stdout)["whole"] is True
    assert "is whole: 5 files" in _run("verify", artifact).stdout.replace("\n", " ")
    data = bytearray((artifact / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (artifact / WEIGHTS).write_bytes(data)
    broken = _run("verify", artifact, "--json")
    assert broken.exit_code == 1
    assert "model.safetensors was altered" in json.loads(broken.stdout)["error"]


def test_verify_knows_a_layout_that_this_build_does_not(store: Store) -> None:
    path = _of(store)[0] / MANIFEST
    text = Manifest.from_json(path.read_text(), "")
    changed = Manifest(**{k: getattr(text, k) for k in text.__slots__} | {"layout": "panels-64"})
    path.write_text(changed.to_json())
    said = json.loads(_run("verify", path.parent, "--json").stdout)["error"]
    assert "layout 'panels-64'" in said
