"""Sources that fetch: wheels through pip itself, and a Hugging Face hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from optimizer.checkpoints.random_weights import cut_tokenizer
from optimizer.pipeline import optimize
from optimizer.progress import SilentProgress
from optimizer.recipe import Recipe
from tests.optimizer.gguf_files import make_gguf
from tests.optimizer.sources.fake_hub import FakeHub
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import file_sha256, read_manifest, verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.weights import load_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    texts = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | texts).items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "tiny.gguf", make_checkpoint(tmp_path / "tiny"))


@pytest.fixture
def wheel(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds it by its own settings, and nothing else: the index is switched off."""
    index = tmp_path / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return _make_wheel(index, {"pkg/tiny.gguf": gguf_file.read_bytes(), "pkg/a.py": b""})


class Bytes(SilentProgress):
    def __init__(self) -> None:
        self.stage = ""
        self.by_stage: dict[str, int] = {}

    def start(self, stage: str) -> None:
        self.stage = stage

    def advance(self, num_bytes: int) -> None:
        self.by_stage[self.stage] = self.by_stage.get(self.stage, 0) + num_bytes


def test_a_gguf_in_a_wheel(tmp_path: Path, wheel: Path, gguf_file: Path) -> None:
    progress = Bytes()
    recipe = Recipe("t", "pypi:tiny-model==1.0#pkg/tiny.gguf", sha256=file_sha256(gguf_file))
    artifact = optimize(recipe, tmp_path / "store", progress)
    manifest = verify_artifact(artifact, full=True)
    assert manifest.source == recipe.source
    assert manifest.source_sha256 == recipe.sha256
    assert progress.by_stage["fetch"] >= wheel.stat().st_size
    wheel.unlink()
    assert optimize(recipe, tmp_path / "store") == artifact
    direct = optimize(Recipe("t", str(gguf_file)), tmp_path / "store")
    assert direct == artifact, "the same model by another way is the same artifact"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("pypi:tiny-model==1.0#pkg/tinny.gguf", r"holds no pkg/tinny.gguf; did you mean 'pkg/tiny"),
        ("pypi:tiny-model==2.0", "cannot download tiny-model==2.0 with pip .*connect to a package"),
    ],
)
def test_what_pip_or_the_wheel_does_not_have(
    tmp_path: Path, wheel: Path, source: str, says: str
) -> None:
    with pytest.raises(ArtifactError, match=says) as caught:
        optimize(source, tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_a_wheel_with_another_model_than_pinned(tmp_path: Path, wheel: Path) -> None:
    recipe = Recipe("t", "pypi:tiny-model==1.0", sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(ArtifactError, match="the recipe pins 0000"):
            optimize(recipe, tmp_path / "store")


def test_no_network_is_said_in_one_line(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:hunter2@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ArtifactError, match="connect to a package index, or stage") as caught:
        optimize("pypi:tiny-model==1.0", tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub with org/tiny; its URL and the model's folder."""
    folder = make_checkpoint(tmp_path / "hub", num_hidden_layers=1)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"another format")
    with FakeHub("org/tiny", folder, COMMIT, ("main", "v1")) as url:
        yield url, folder


def _hub_environment(endpoint: str, cache: Path) -> dict[str, str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    return environment


def _command(endpoint: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The hub's client reads its settings when imported, so it needs a process of its own."""
    environment = _hub_environment(endpoint, cache)
    command = [sys.executable, "-m", "optimizer", *arguments]
    root = Path(__file__).parents[3]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)


def test_a_hub_id_from_the_command_line(tmp_path: Path, hub: tuple[str, Path]) -> None:
    endpoint, folder = hub
    cache, store = tmp_path / "cache", tmp_path / "store"
    ran = _command(endpoint, cache, "org/tiny@v1", "--store", str(store))
    assert ran.returncode == 0, ran.stderr
    artifact = Path(ran.stdout.removesuffix("\n"))
    manifest = verify_artifact(artifact, full=True)
    assert (manifest.source, manifest.revision) == ("org/tiny@v1", COMMIT)
    direct = read_manifest(optimize(folder, tmp_path / "direct"))
    assert direct.files["model.safetensors"] == manifest.files["model.safetensors"]
    assert direct.source_sha256 == manifest.source_sha256
    assert not list(cache.rglob("onnx"))

    missing = _command(endpoint, cache, "org/other", "--store", str(store))
    assert missing.returncode == 1
    last = missing.stderr.splitlines()[-1]
    assert last.startswith("error: the Hugging Face hub has no org/other")

    cached = _command("http://127.0.0.1:9", cache, "org/tiny@v1", "--store", str(tmp_path / "two"))
    assert Path(cached.stdout.strip()).name == artifact.name
    offline = _command("http://127.0.0.1:9", tmp_path / "none", "org/tiny", "--store", str(store))
    assert offline.returncode == 1
    assert "connect, or copy the model to a folder" in offline.stderr.splitlines()[-1]
    assert "Traceback" not in offline.stderr


KILLED = """
import os, signal, sys
from optimizer.__main__ import main
from optimizer.pipeline import _CountingProgress
from optimizer.sources import hub_cache
from optimizer.sources.partial_file import PartialFile

hub_cache.LARGE, PartialFile.chunk_size = 100_000, 20_000
left = int(sys.argv.pop(1))
advance = _CountingProgress.advance
def count(self, num_bytes):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, num_bytes)
_CountingProgress.advance = count
sys.exit(main())
"""


@pytest.mark.slow
def test_a_large_file_of_the_hub_goes_on_after_a_kill(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hub", num_hidden_layers=1)
    direct = read_manifest(optimize(folder, tmp_path / "direct"))
    hub = FakeHub("org/tiny", folder, COMMIT, ("main",))
    with hub as endpoint:
        store, cache = tmp_path / "store", tmp_path / "cache"
        root = Path(__file__).parents[3]
        environment = _hub_environment(endpoint, cache)
        runs = []
        for kill_after in (5, 0):
            command = [sys.executable, "-c", KILLED, str(kill_after), "org/tiny"]
            command += ["--store", str(store)]
            runs.append(
                subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
            )
            if kill_after:
                log = next((store / ".work").rglob("*.part.log")).read_text().splitlines()
                hub.answers.clear()
    assert [run.returncode for run in runs] == [-9, 0], runs[1].stderr
    size = (folder / "model.safetensors").stat().st_size
    brought = [n for name, status, n in hub.answers if name == "model.safetensors" and n > 1]
    assert all(status == 206 for name, status, _ in hub.answers if name == "model.safetensors")
    assert len(log) > 4
    assert sum(brought) <= size - 20_000 * (len(log) - 2)
    manifest = verify_artifact(Path(runs[1].stdout.strip()), full=True)
    assert manifest.files["model.safetensors"] == direct.files["model.safetensors"]
    assert manifest.source_sha256 == direct.source_sha256
    links = [path for path in cache.rglob("model.safetensors") if path.is_symlink()]
    assert [link.read_bytes() for link in links] == [(folder / "model.safetensors").read_bytes()]


RANDOM_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 290,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def _random(tokenizer: Path, seed: int = 0, **config: Any) -> Recipe:
    return Recipe(
        "shape",
        f"random:{seed}",
        dtype="bfloat16",
        verify="none",
        config=RANDOM_CONFIG | config,
        tokenizer=str(tokenizer),
    )


def test_random_weights_of_any_shape(tmp_path: Path) -> None:
    lent = make_checkpoint(tmp_path / "tiny")
    artifact = optimize(_random(lent), tmp_path / "store")
    manifest = read_manifest(artifact)
    assert (manifest.source, manifest.dtype) == ("random:0", "bfloat16")
    config = ModelConfig.read(artifact)
    weights = load_weights(artifact, config, torch.float32, torch.device("cpu"))
    assert weights["layers.1.gate_up_proj.weight"].shape == (192, 64)
    assert weights["head.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(weights["norm.weight"], torch.ones(64))
    q, k, v = weights["layers.0.qkv_proj.weight"].split([64, 16, 16])
    assert not torch.equal(k, v)
    assert not torch.equal(q[:16], k)
    again = optimize(_random(lent), tmp_path / "again")
    assert again.name == artifact.name
    others = [_random(lent, seed=1), _random(lent, rms_norm_eps=1e-6)]
    names = {optimize(recipe, tmp_path / "store").name for recipe in others}
    assert len(names | {artifact.name}) == 3


def test_a_random_model_has_a_real_tokenizer(tmp_path: Path) -> None:
    lent = make_checkpoint(tmp_path / "tiny")
    artifact = optimize(_random(lent), tmp_path / "store")
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    whole = Tokenizer.from_file(str(lent / "tokenizer.json"))
    assert (whole.get_vocab_size(), tokenizer.get_vocab_size()) == (300, 290)
    text = "<|im_start|>Gravity is the force of a naïve 你好 star.<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids) < 290
    settings = json.loads((artifact / "tokenizer_config.json").read_text())
    assert (settings["model_max_length"], "chat_template" in settings) == (128, True)
    with pytest.raises(ArtifactError, match="tokenizer of type 'WordLevel' cannot be cut"):
        cut_tokenizer(b'{"model": {"type": "WordLevel"}}', 10)
