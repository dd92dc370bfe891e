"""The HTTP API over a real engine with SmolLM2, behind uvicorn on a loopback port. No test."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from torchweave_ray.api.access.key_file import ApiKey, digest_of, new_key, write_keys
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer

CONTEXT, KV_BYTES = 2048, 256 << 20


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    guarded_url: str
    """The same engine for those who have the key; the page itself is open."""
    key: str


@contextmanager
def serving(artifact: Path, folder: Path) -> Iterator[Served]:
    """The engine lives in the servers' loop, as in a replica."""
    config = EngineConfig.from_dict({"max_model_len": CONTEXT, "cache": {"kv_memory": KV_BYTES}})
    loaded, tokenizer = load_model(artifact, config), load_tokenizer(artifact)
    engine = AsyncEngine(build_engine(loaded, config, tokenizer), loaded.info)

    async def load(model_id: str) -> Tokenizer:
        return tokenizer

    key, keys = new_key(), folder / "keys.yaml"
    write_keys(keys, [ApiKey(id="reader", sha256=digest_of(key), tenant="readers")])
    guarded = ApiSettings(keys_file=str(keys), pages_need_key=False)
    servers = [_server(create_app(engine, load, each)) for each in (ApiSettings(), guarded)]

    async def run() -> None:
        engine.start()
        try:
            await asyncio.gather(*(server.serve() for server in servers))
        finally:
            engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        while not all(server.started for server in servers):
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(*(_url(server) for server in servers), key)
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(20)


def _server(app: Starlette) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))


def _url(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
