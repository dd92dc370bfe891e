"""Conversion goes on after a kill or a full disk, and what was served before is unchanged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimizer.pipeline import optimize
from optimizer.recipe import Recipe, load_recipe
from optimizer.tensor_file import TensorWriter
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import verify_artifact
from torchweave_ray.models.tensors import StoredTensor

ROOT = Path(__file__).parents[3]
ENTRIES = [StoredTensor(name, (100, 10), torch.bfloat16) for name in "abcde"]


def _write(path: Path, key: str | None, upto: int = 5) -> list[int]:
    """Writes entries upto this one; the bytes that it told of."""
    told: list[int] = []
    with TensorWriter(path, ENTRIES, told.append, key) as writer:
        for index in range(writer.num_done, upto):
            writer.write(torch.full((60, 10), float(index)))
            writer.write(torch.full((40, 10), float(index)))
        if upto < len(ENTRIES):
            raise KeyboardInterrupt
    return told


def test_a_writer_goes_on_where_the_disk_is_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorWriter, "sync_bytes", 3000)
    _write(tmp_path / "whole", None)
    path = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt):
        _write(path, "k", upto=3)
    with path.open("ab") as file:
        file.write(b"not certain")
    assert _write(path, "k") == [4000, *[1200, 800] * 3], "two entries were noted"
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["file", "whole"]
    for key, cut in (("other", None), ("k", 4096)):  # another source; a file that was cut
        with pytest.raises(KeyboardInterrupt):
            _write(path, "k", upto=3)
        if cut is not None:
            os.truncate(path, cut)
        assert _write(path, key)[0] == 0
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from optimizer.pipeline import optimize
from optimizer.progress import SilentProgress
from optimizer.recipe import load_recipe
from optimizer.tensor_file import TensorWriter

TensorWriter.sync_bytes = 30_000
class Killer(SilentProgress):
    stage = ""
    count = 0
    def start(self, stage):
        self.stage = stage
    def advance(self, num_bytes):
        self.count += (self.stage == sys.argv[3])
        if self.count == 12:
            os.kill(os.getpid(), signal.SIGKILL)
optimize(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), Killer())
"""


def test_a_kill_within_convert_and_fuse(tmp_path: Path) -> None:
    """The next run copies what was certain on the disk, and ends with the same artifact."""
    source = make_checkpoint(tmp_path / "tiny")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {source}\ndtype: bfloat16\nverify: none\n")
    expected = optimize(load_recipe(recipe), tmp_path / "direct").name
    store = tmp_path / "store"
    for stage in ("convert", "fuse"):
        command = [sys.executable, "-c", KILLED, str(recipe), str(store), stage]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == -signal.SIGKILL, ran.stderr
        note = next((store / ".work").rglob("*.progress"))
        assert note.parent.name == stage
        assert json.loads(note.read_text())[1] > 0
    artifact = optimize(load_recipe(recipe), store)
    assert artifact.name == expected
    verify_artifact(artifact, full=True)


FULL = """
set -e
store=$1; big=$2; shift 2
mount -t tmpfs -o size=3m none "$store"
"$@" small.yaml --store "$store"
head -c 100000 /dev/zero > "$store/other"
set +e
"$@" "$big" --store "$store" 2> full.txt; echo "rc $?"
set -e
grep -o "error:.*" full.txt
test -f "$store/small/manifest.json"
ls "$store" | grep -c "big" || true
mount -o remount,size=40m "$store"
"$@" "$big" --store "$store"
"$@" small.yaml --store "$store"
"""


@pytest.mark.slow
def test_a_full_disk_of_its_own(tmp_path: Path) -> None:
    """A tmpfs of 3 MB in a mount namespace: the larger model does not fit, the small one stays."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lets no user mount a tmpfs of his own")
    for name, hidden in (("small", 64), ("big", 256)):
        folder = make_checkpoint(tmp_path / f"{name}-source", hidden_size=hidden)
        recipe = f"source: {folder}\nverify: none\ndtype: bfloat16\n"
        (tmp_path / f"{name}.yaml").write_text(recipe)
    (tmp_path / "store").mkdir()
    command = ["unshare", "-rm", "bash", "-c", FULL, "-", str(tmp_path / "store"), "big.yaml"]
    command += [sys.executable, "-m", "optimizer"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    first, rc, error, count, second, again = ran.stdout.splitlines()
    assert (rc, count, again) == ("rc 1", "0", first)
    assert f"the disk of {tmp_path}/store" in error
    assert "is full: " in error
    assert " needs " in error
    assert "MB are free" in error
    assert "/big-" in second


@pytest.mark.slow
def test_a_disk_that_fills_while_it_is_written(tmp_path: Path) -> None:
    """No file may grow over 200 KB: what the kernel says then names the stage and its need."""
    source = make_checkpoint(tmp_path / "tiny")
    script = (
        "import resource, signal, sys; from optimizer.__main__ import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000)); sys.exit(main(sys.argv[1:]))"
    )
    store = tmp_path / "store"
    command = [sys.executable, "-c", script, str(source), "--store", str(store)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert "convert is full: convert needs " in last
    assert "File too large" in last
    assert optimize(source, store).is_dir()


def test_too_little_room_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "tiny")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("optimizer.disk_space.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ArtifactError, match=r"convert needs 0\.\d MB there, 0\.0 MB are free"):
        optimize(Recipe("t", str(source), verify="none"), tmp_path / "store")
