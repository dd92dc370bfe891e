"""Adapters over HTTP and behind Serve: listed, asked for by name, refused, fetched from a URL."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
import torch
from ray import serve

from deployments.app import build
from deployments.args import AppArgs
from tests.lora.adapters import make_adapter
from tests.tiny import make_tiny_artifact
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.errors import ConfigError, InvalidRequest, ModelNotFound
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer

ASKED = {"prompt": "Gravity is", "max_tokens": 10, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_tiny_artifact(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, artifact: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("red", "blue")):
        make_adapter(folder / name, artifact, seed=seed)
    make_adapter(folder / "wide", artifact, rank=100)
    return folder


def test_the_http_app_serves_base_and_adapters_side_by_side(artifact: Path, adapters: Path) -> None:
    config = EngineConfig.from_dict(
        {"lora": {"source": str(adapters)}, "cache": {"kv_memory": 1 << 20}}
    )
    loaded = load_model(artifact, config)
    tokenizer = load_tokenizer(artifact)

    async def load(model: str) -> Tokenizer:
        assert model == "tiny"
        return tokenizer

    async def run() -> None:
        engine = AsyncEngine(build_engine(loaded, config, tokenizer), loaded.info)
        engine.start()
        app = create_app(engine, load, ApiSettings())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def text(model: str) -> Any:
                answer = await client.post("/v1/completions", json={**ASKED, "model": model})
                body = answer.json()
                assert body["model"] == model
                return body["choices"][0]["text"]

            listed = (await client.get("/v1/models")).json()["data"]
            assert [(each["id"], each["parent"]) for each in listed] == [
                ("tiny", None),
                *((f"tiny:{name}", "tiny") for name in ("blue", "red", "wide")),
            ]
            one = (await client.get("/v1/models/tiny:red")).json()
            assert (one["id"], one["parent"]) == ("tiny:red", "tiny")
            names = ["tiny", "tiny:red", "tiny:blue"]
            alone = [await text(name) for name in names]
            assert len(set(alone)) == 3
            assert await asyncio.gather(*map(text, names)) == alone
            for model, status, said in (
                ("tiny:pink", 404, "no adapter 'pink'; there is blue, red, wide"),
                ("tiny:../red", 404, "no adapter '../red'; there is blue, red, wide"),
                ("other:red", 404, "no model 'other:red'; there is tiny"),
                ("tiny:wide", 400, "its rank is 100, lora.max_rank 64"),
            ):
                answer = await client.post("/v1/completions", json={**ASKED, "model": model})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (status, "model"), error
                assert said in error["message"]
        engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("source", ["folder", "url"])
def test_behind_serve(tmp_path: Path, artifact: Path, adapters: Path, source: str) -> None:
    where = str(adapters)
    if source == "url":
        memory = fsspec.filesystem("memory")
        memory.put(where, "/lora-test", recursive=True)
        where = "memory://lora-test"
    model = {
        "id": "org/tiny:1b",
        "artifact": str(artifact),
        "threads": 1,
        "lora": {"source": where},
    }
    model["engine"] = {"cache": {"kv_memory": 1 << 20}}
    args = AppArgs.model_validate({"models": [model], "artifact_dir": str(tmp_path / "store")})
    handle = serve.run(build(args), name=f"lora-{source}", _local_testing_mode=True)

    def text(name: str) -> str:
        asked = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
        output = handle.complete.remote("Gravity is", model=name, **asked).result()
        assert output.usage.completion_tokens == 10
        said: str = output.deltas[0].text
        return said

    assert len({text(f"org/tiny:1b{name}") for name in ("", ":red", ":blue")}) == 3
    with pytest.raises(ModelNotFound, match="no adapter 'pink'; there is blue, red, wide"):
        text("org/tiny:1b:pink")
    with pytest.raises(InvalidRequest, match=r"its rank is 100, lora\.max_rank 64"):
        text("org/tiny:1b:wide")


def test_arguments() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_rank'"):
        AppArgs.model_validate({"models": [{"lora": {"source": "a", "maxrank": 3}}]})
    with pytest.raises(ConfigError, match="set lora of the model"):
        AppArgs.model_validate({"models": [{"engine": {"lora": {"source": "a"}}}]})
