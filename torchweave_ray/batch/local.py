"""An engine of one's own: the HTTP API's app over an engine in this process. No server, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.types import ASGIApp

from torchweave_ray.api.app import create_app
from torchweave_ray.batch.answering import Ask, of_app
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer


@asynccontextmanager
async def local_engine(
    artifact: Path, config: EngineConfig, model_id: str | None = None
) -> AsyncIterator[Ask]:
    """Raises what `load_model` does."""
    async with local_app(artifact, config, model_id) as app:
        yield of_app(app)


@asynccontextmanager
async def local_app(
    artifact: Path, config: EngineConfig, model_id: str | None = None
) -> AsyncIterator[ASGIApp]:
    """The app alone, for who wants answers as they stream. Raises what `load_model` does."""
    loaded = await asyncio.to_thread(load_model, artifact, config, model_id)
    tokenizer = load_tokenizer(loaded.tokenizer_dir)
    engine = AsyncEngine(
        build_engine(loaded, config, tokenizer),
        loaded.info,
        stats_interval_s=config.stats_interval_s,
    )
    engine.start()

    async def load_it(model: str) -> Tokenizer:
        return tokenizer

    try:
        yield create_app(engine, load_it)
    finally:
        await asyncio.to_thread(engine.close)
