"""Streams of a real engine, opened again at every event: the text is that of the first run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tests.tiny import make_tiny_artifact
from torchweave_ray.api.app import create_app
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer

LONG: dict[str, Any] = {"seed": 3, "temperature": 1.0, "ignore_eos": True, "stream": True}
BODIES: dict[str, dict[str, Any]] = {
    "plain": LONG | {"max_tokens": 16},
    "unseeded": LONG | {"max_tokens": 16, "seed": None, "n": 2},
    "choices": LONG | {"max_tokens": 8, "n": 2, "frequency_penalty": 0.5},
    "stop": LONG | {"max_tokens": 24, "stop": ["a", "e"], "min_tokens": 6},
    "regex": LONG | {"max_tokens": 16, "structured_outputs": {"regex": "[a-f]{4,12}"}},
}


def blocks_of(body: bytes) -> list[tuple[str, Any]]:
    """(id, chunk) of each event."""
    pairs = []
    for block in body.decode().split("\n\n")[:-1]:
        event_id, _, data = block.partition("\n")
        assert event_id.startswith("id: "), block
        shown = data.removeprefix("data: ")
        pairs.append((event_id[4:], shown if shown == "[DONE]" else json.loads(shown)))
    return pairs


def said(pairs: list[tuple[str, Any]]) -> list[Any]:
    """By choice: text and finish reason; then what every chunk says alike."""
    texts: dict[int, str] = {}
    rest = set()
    assert pairs[-1][1] == "[DONE]"
    for _, chunk in pairs[:-1]:
        rest.add(chunk["id"])
        for choice in chunk["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            if choice["finish_reason"] is not None:
                rest.add((index, choice["finish_reason"], choice["stop_reason"]))
    return [texts, rest]


def client_of(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_the_text_goes_on(tmp_path: Path, body: dict[str, Any]) -> None:
    async def run() -> None:
        artifact = make_tiny_artifact(tmp_path / "tiny")
        config = EngineConfig.from_dict({"cache": {"kv_memory": 1 << 20}, "runner": {"threads": 1}})
        loaded, tokenizer = load_model(artifact, config), load_tokenizer(artifact)
        engine = AsyncEngine(build_engine(loaded, config, tokenizer), loaded.info)
        engine.start()

        async def load(model_id: str) -> Tokenizer:
            return tokenizer

        async with (
            client_of(create_app(engine, load)) as client,
            client_of(create_app(engine, load)) as stranger,
        ):
            asked = {"prompt": "the quick brown fox", **body}
            whole = blocks_of((await client.post("/v1/completions", json=asked)).content)
            for had, (event_id, _) in enumerate(whole, 1):
                headers = {"Last-Event-ID": event_id}
                again = await client.get(f"/v1/streams/{event_id[:32]}", headers=headers)
                assert again.status_code == 200, again.text
                rest = blocks_of(again.content)
                assert not rest or said(whole[:had] + rest) == said(whole), event_id
                again = await stranger.post("/v1/completions", json=asked, headers=headers)
                assert again.status_code == 200, again.text
                rest = blocks_of(again.content)
                assert not rest or said(whole[:had] + rest) == said(whole), event_id
        engine.close()

    asyncio.run(run())
