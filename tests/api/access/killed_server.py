"""A server to be killed: streams without end, and logs what they come to. No test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn

from tests.fakes import FakeBackend, Script
from tests.tiny import CHAT_TEMPLATE, make_tokenizer
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.outputs import GenerateRequest, RequestOutput
from torchweave_ray.tokenizer import Tokenizer


class Slow(FakeBackend):
    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        async for output in super().generate(request):
            await asyncio.sleep(0.01)
            yield output


async def serve(folder: Path) -> None:
    """Prints its address, once it listens."""

    async def load(model: str) -> Tokenizer:
        return Tokenizer(make_tokenizer(), {"chat_template": CHAT_TEMPLATE})

    app = create_app(Slow(Script(["a"] * 10_000)), load, ApiSettings(usage_log=str(folder)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)
    await running
