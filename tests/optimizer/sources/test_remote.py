"""Models behind URLs: the same artifact as from a folder, continued after a kill, and refusals."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from optimizer.pipeline import optimize
from optimizer.recipe import Recipe, resolve_recipe
from optimizer.sources import http_files, retry
from optimizer.sources.partial_file import PartialFile
from tests.optimizer.gguf_files import make_gguf
from tests.optimizer.sources.web_server import WebServer
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.models.artifact import read_manifest

ROOT = Path(__file__).parents[3]
CHUNK = 20_000
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialFile, "chunk_size", CHUNK)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def web(source: Path) -> Iterator[WebServer]:
    with WebServer(source) as server:
        yield server


def _stage(source: str, store: Path, **keys: Any) -> Path:
    recipe = dataclasses.replace(resolve_recipe(source), verify="none", **keys)
    return optimize(recipe, store)


def _shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b c.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_folder_on_a_web_server(tmp_path: Path, source: Path, web: WebServer) -> None:
    direct = _stage(str(source), tmp_path / "direct")
    artifact = _stage(f"{web.url}/models/tiny/", tmp_path / "store")
    assert artifact.name == direct.name, "the same model by another way is the same artifact"
    manifest = read_manifest(artifact)
    assert manifest.source == f"{web.url}/models/tiny/"
    size = sum(path.stat().st_size for path in source.iterdir())
    assert web.num_bytes == size, "each byte came once"
    report = json.loads((artifact / "report.json").read_text())
    assert report["stages"][0]["num_bytes"] == size
    assert report["source"]["files"].keys() == {path.name for path in source.iterdir()}


def test_shards_by_their_index(tmp_path: Path, source: Path, web: WebServer) -> None:
    _shard(source)
    direct = _stage(str(source), tmp_path / "direct")
    assert _stage(f"{web.url}/tiny", tmp_path / "store").name == direct.name


@pytest.mark.parametrize("protocol", ["memory", "local"])
def test_folders_and_files_by_fsspec(tmp_path: Path, source: Path, protocol: str) -> None:
    (source / "onnx").mkdir()
    (source / "onnx" / WEIGHTS).write_bytes(b"another format")
    (source / "README.md").write_text("not read")
    gguf = make_gguf(source / "t.gguf", source)
    base = str(source) if protocol == "local" else f"/{tmp_path.name}"
    if protocol == "memory":
        fsspec.filesystem(protocol).put(f"{source}/", f"{base}/", recursive=True)
    for name, local in (("", source), ("/t.gguf", gguf)):
        direct = _stage(str(local), tmp_path / "direct")
        staged = _stage(f"{protocol}://{base}{name}", tmp_path / "store")
        assert staged.name.rpartition("-")[2] == direct.name.rpartition("-")[2]


def test_a_file_url_is_read_in_place(tmp_path: Path, source: Path) -> None:
    artifact = _stage(source.as_uri(), tmp_path / "store")
    assert read_manifest(artifact).source == str(source)


KILLED = """
import os, signal, sys
from pathlib import Path
from optimizer.pipeline import optimize
from optimizer.progress import SilentProgress
from optimizer.recipe import Recipe
from optimizer.sources.partial_file import PartialFile

PartialFile.chunk_size = int(sys.argv[4])
class Killer(SilentProgress):
    left = int(sys.argv[3])
    def advance(self, num_bytes):
        Killer.left -= 1
        if Killer.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
optimize(Recipe("t", sys.argv[1], verify="none"), Path(sys.argv[2]), Killer())
"""


def _kill(source: str, store: Path, after: int) -> None:
    command = [sys.executable, "-c", KILLED, source, str(store), str(after), str(CHUNK)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr


def test_a_killed_download_goes_on(tmp_path: Path, source: Path, web: WebServer) -> None:
    expected = _stage(str(source), tmp_path / "direct").name.rpartition("-")[2]
    store, url = tmp_path / "store", f"{web.url}/tiny"
    size = sum(path.stat().st_size for path in source.iterdir())
    _kill(url, store, after=8)
    partial = next((store / ".work").rglob("*.part.log")).parent
    lines = (partial / f"{WEIGHTS}.part.log").read_text().splitlines()[1:]
    assert lines
    web.num_bytes = 0
    again = optimize(Recipe("t", url, verify="none"), store)
    assert again.name == f"t-{expected}"
    assert web.num_bytes <= size - CHUNK * len(lines) + CHUNK  # the last chunk may be short


@pytest.mark.slow
def test_damaged_and_outdated_parts_are_fetched_again(
    tmp_path: Path, source: Path, web: WebServer
) -> None:
    store, url = tmp_path / "store", f"{web.url}/tiny"
    _kill(url, store, after=9)
    part = next((store / ".work").rglob(f"{WEIGHTS}.part"))
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    copy = shutil.copytree(store, tmp_path / "copy")
    expected = _stage(str(source), tmp_path / "direct").name.rpartition("-")[2]
    assert optimize(Recipe("t", url, verify="none"), store).name == f"t-{expected}"
    make_checkpoint(source, seed=1, num_hidden_layers=1)  # another version under the same URL
    expected = _stage(str(source), tmp_path / "direct").name.rpartition("-")[2]
    assert optimize(Recipe("t", url, verify="none"), copy).name == f"t-{expected}"


@pytest.mark.slow
def test_a_killed_read_by_fsspec_goes_on(tmp_path: Path, source: Path) -> None:
    expected = _stage(str(source), tmp_path / "direct").name.rpartition("-")[2]
    store, url = tmp_path / "store", f"local://{source}"
    _kill(url, store, after=8)
    done = len(next((store / ".work").rglob(f"{WEIGHTS}.part.log")).read_text().splitlines()) - 1
    assert done > 0
    report = json.loads(
        (optimize(Recipe("t", url, verify="none"), store) / "report.json").read_text()
    )
    size = sum(path.stat().st_size for path in source.iterdir())
    assert report["stages"][0]["num_bytes"] <= size - (done - 1) * CHUNK
    assert (store / f"t-{expected}").is_dir()


def test_without_ranges_and_with_broken_answers(
    tmp_path: Path, source: Path, web: WebServer
) -> None:
    direct = _stage(str(source), tmp_path / "direct")
    web.cut = 3
    assert _stage(f"{web.url}/tiny", tmp_path / "ranges").name == direct.name
    web.ranges, web.cut = False, 3
    assert _stage(f"{web.url}/tiny", tmp_path / "whole").name == direct.name


def test_passing_failures_are_tried_again(tmp_path: Path, web: WebServer) -> None:
    web.statuses = {WEIGHTS: [503, 429, 500], "config.json": [502]}
    _stage(f"{web.url}/tiny", tmp_path / "store")
    assert web.statuses == {WEIGHTS: [], "config.json": []}


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"may not be read \(401\): set the credentials"),
        (403, r"may not be read \(403\)"),
        (404, "is not there"),
        (500, "HTTP status 500"),
    ],
)
def test_refusals(tmp_path: Path, web: WebServer, status: int, says: str) -> None:
    for name in ("config.json", "x.gguf"):
        web.statuses[name] = [-status]
    for path in ("/tiny", "/tiny/x.gguf"):
        web.paths.clear()
        with pytest.raises(ArtifactError, match=says) as caught:
            _stage(web.url + path, tmp_path / "store")
        assert "\n" not in str(caught.value)
        asked = [path for path in web.paths if path.endswith(("config.json", "x.gguf"))]
        asked = [path for path in asked if not path.endswith(("r_config.json", "n_config.json"))]
        assert len(asked) <= (6 if status == 500 else 2)
    assert not [p for p in (tmp_path / "store").iterdir() if p.name[0] != "."]


def test_a_wrong_hash(tmp_path: Path, web: WebServer) -> None:
    for _ in range(2):
        with pytest.raises(ArtifactError, match="the recipe pins 0000"):
            _stage(f"{web.url}/tiny", tmp_path / "store", sha256="0" * 64)


SECRETS = ("hunter2secret", "AKIASECRETKEY", "deadbeefsignature", "opaque-value")


def test_no_secret_is_shown_anywhere(
    tmp_path: Path, source: Path, web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    web.password = "alice:hunter2secret"
    host = web.url.removeprefix("http://")
    query = "X-Amz-Credential=AKIASECRETKEY&X-Amz-Signature=deadbeefsignature&k=opaque-value"
    url = f"http://alice:hunter2secret@{host}/tiny?{query}"
    store = tmp_path / "store"
    artifact = _stage(url, store)
    manifest = read_manifest(artifact)
    assert manifest.source == f"http://{host}/tiny?***"
    resigned = url.replace("deadbeefsignature", "another")
    assert _stage(resigned, store) == artifact
    asked = len(web.paths)
    other = _stage(url.replace("opaque-value", "another"), store)
    assert len(web.paths) > asked, "another parameter may mean another file"
    assert other == artifact
    shown = [repr(resolve_recipe(url)), caplog.text]
    for status in (403, 404, 500):
        web.statuses["config.json"] = [-status]
        with pytest.raises(ArtifactError) as caught:
            _stage(url, tmp_path / "refused")
        assert caught.value.__cause__ is None
        shown.append(str(caught.value))
    for wrong in (url.replace("http:", "htpt:"), f"{url}#x", f"simplecache::{url}"):
        with pytest.raises(ConfigError) as wrongly:
            resolve_recipe(wrong)
        shown.append(str(wrongly.value))
    web.server_close()
    with pytest.raises(ArtifactError) as gone:
        _stage(url, tmp_path / "refused")
    shown.append(str(gone.value))
    files = [path for path in tmp_path.rglob("*") if path.is_file() and source not in path.parents]
    everything = "\n".join([*shown, caplog.text]).encode()
    everything += b"".join(path.read_bytes() for path in files)
    assert not [secret for secret in SECRETS if secret.encode() in everything]
    assert "GET /tiny/config.json?***" in caplog.text


def test_a_password_stays_with_its_host(tmp_path: Path, source: Path, web: WebServer) -> None:
    with WebServer(source) as front:
        front.redirect = web.url.replace("127.0.0.1", "localhost")
        host = front.url.removeprefix("http://")
        _stage(f"http://alice:secret@{host}/tiny", tmp_path / "store")
    assert set(front.passwords) == {"Basic YWxpY2U6c2VjcmV0"}
    assert set(web.passwords) == {None}


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("https://models.example/a", "http://models.example/a", "it is not https"),
        ("https://models.example/a", "file:///etc/passwd", "it is not https"),
        ("https://models.example/a", "https://meta.example/a?sig=x", "is inside this network"),
        ("http://models.example/a", "http://169.254.169.254/latest", "is inside this network"),
        ("https://models.example/a", "https://cdn.example/a?sig=x", None),
        ("http://meta.example/a", "http://127.0.0.1/a", None),
    ],
)
def test_where_redirects_may_lead(
    monkeypatch: pytest.MonkeyPatch, source: str, target: str, says: str | None
) -> None:
    names = {"models.example": "93.184.216.34", "cdn.example": "1.1.1.1", "meta.example": "::1"}

    def resolve(host: str, port: None) -> list[Any]:
        return [(0, 0, 0, "", (names.get(host, host), 0))]

    monkeypatch.setattr(http_files.socket, "getaddrinfo", resolve)
    if says is None:
        assert http_files._checked_redirect(source, target) == target
        return
    with pytest.raises(ArtifactError, match=says) as caught:
        http_files._checked_redirect(source, target)
    assert "sig=x" not in str(caught.value)


def test_endless_redirects(tmp_path: Path, web: WebServer) -> None:
    web.redirect = web.url
    with pytest.raises(ArtifactError, match="is redirected more than 5 times"):
        _stage(f"{web.url}/t.gguf", tmp_path / "store")


@pytest.mark.parametrize("shard", ["../../escaped.safetensors", "/etc/passwd", "..", ".x", 3])
def test_an_index_names_no_file_elsewhere(
    tmp_path: Path, source: Path, web: WebServer, shard: Any
) -> None:
    _shard(source)
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(values))
    for reference in (f"{web.url}/tiny", str(source)):
        with pytest.raises(ArtifactError, match=r"no .*safetensors file of its own folder"):
            _stage(reference, tmp_path / "store")


def test_links_of_a_local_folder(tmp_path: Path, source: Path) -> None:
    blobs = tmp_path / "cache" / "models--org--tiny" / "blobs"
    snapshot = blobs.parent / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copy(path, blobs)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert _stage(str(snapshot), tmp_path / "store").is_dir()
    (source / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is a link out of its folder"):
        _stage(str(source), tmp_path / "store")


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("s3://bucket/model", ArtifactError, "s3://.*s3fs"),
        ("gs://bucket/m.gguf", ArtifactError, "gs://.*gcsfs"),
        ("s33://bucket/model", ConfigError, "no driver for s33://; did you mean 's3'"),
        ("https:///model", ConfigError, "names no host"),
        ("memory://nothing/here", ArtifactError, "is not there"),
        ("https://host/m.gguf#x", ConfigError, "not after '#'"),
    ],
)
def test_urls_that_lead_nowhere(
    tmp_path: Path, source: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        _stage(source, tmp_path / "store")


def test_a_full_disk_while_fetching(tmp_path: Path, web: WebServer) -> None:
    """RLIMIT_FSIZE is the disk: no file may grow over 60 KB, then it may."""
    script = (
        "import resource, signal, sys; from pathlib import Path;"
        "from optimizer.__main__ import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    store = tmp_path / "store"
    command = [sys.executable, "-c", script, f"{web.url}/tiny", "--store", str(store)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert "is full: fetch needs" in last
    assert "MB are free" in last
    assert (store / ".work").exists()
