"""Adapters behind a web server: fetched by name, looked at again, refused when of no use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optimizer.sources import remote_adapters
from optimizer.sources.remote_adapters import RemoteAdapters
from tests.lora.adapters import make_adapter
from tests.optimizer.sources.web_server import WebServer
from tests.tiny import make_tiny_artifact
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.errors import InvalidRequest, ModelNotFound
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.runner import adapters
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

PROMPT = tuple(range(3, 30))
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def web(tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """What was found is looked for again at once."""
    for module in (remote_adapters, adapters):
        monkeypatch.setattr(module, "FRESH_S", 0.0)
    for seed, name in enumerate(("red", "blue")):
        make_adapter(tmp_path / "web" / name, artifact, seed=seed)
    with WebServer(tmp_path / "web") as server:
        yield server


def opened(artifact: Path, source: str, cache: Path | None = None) -> Engine:
    config = EngineConfig.from_dict(
        {"lora": {"source": source}, "runner": {"threads": 1}, "cache": {"kv_memory": 1 << 20}}
    )
    remote = None if cache is None else RemoteAdapters(source, cache)
    loaded = load_model(artifact, config, adapters=remote)
    return build_engine(loaded, config, load_tokenizer(artifact))


def said(engine: Engine, name: str) -> list[int]:
    engine.add(GenerateRequest("a", f"tiny:{name}", PROMPT, GREEDY, adapter=name))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += [token for delta in output.deltas for token in delta.token_ids]
    return tokens


def test_what_is_fetched_is_what_lies_there(tmp_path: Path, artifact: Path, web: WebServer) -> None:
    here = opened(artifact, str(web.folder))
    expected = {name: said(here, name) for name in ("red", "blue")}
    here.close()
    assert expected["red"] != expected["blue"]
    there = opened(artifact, web.url, tmp_path / "cache")
    web.cut = 1  # a connection that breaks off is taken up again
    assert {name: said(there, name) for name in ("red", "blue")} == expected
    assert there.adapters.names() == ["blue", "red"]
    num_bytes = web.num_bytes
    assert said(there, "red") == expected["red"]
    assert web.num_bytes == num_bytes, "it is here already"
    shutil.copytree(web.folder / "blue", web.folder / "red", dirs_exist_ok=True)
    assert said(there, "red") == expected["blue"]
    shutil.rmtree(web.folder / "red")
    with pytest.raises(ModelNotFound, match="no adapter 'red'; there is blue"):
        said(there, "red")
    asked = len(web.paths)
    for name in ("../blue", "a/b", ".hidden"):
        with pytest.raises(ModelNotFound):
            said(there, name)
    assert len(web.paths) == asked, "no such name is asked for"
    there.close()


def test_what_is_of_no_use_is_refused_by_name(
    tmp_path: Path, artifact: Path, web: WebServer
) -> None:
    engine = opened(artifact, web.url.replace("//", "//user:secret@"), tmp_path / "cache")
    weights = web.folder / "red" / WEIGHTS
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * len(whole)):
        weights.write_bytes(damaged)
        with pytest.raises(InvalidRequest, match="adapter 'red' cannot be used: ") as caught:
            said(engine, "red")
        assert caught.value.param == "model"
        assert str(tmp_path) not in str(caught.value)
        assert len(said(engine, "blue")) == 10
    web.statuses[WEIGHTS] = [-403]
    with pytest.raises(
        InvalidRequest, match="'red' cannot be used: it cannot be fetched"
    ) as caught:
        said(engine, "red")
    assert "secret" not in str(caught.value)
    web.statuses.clear()
    weights.write_bytes(whole)
    assert len(said(engine, "red")) == 10
    engine.close()
