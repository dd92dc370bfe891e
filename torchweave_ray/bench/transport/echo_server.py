"""`python -m torchweave_ray.bench.transport.echo_server`: API and engine in one process, no Ray.

What HTTP and the engine cost alone: the floor that the paths through Ray Serve are compared with.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import uvicorn

from torchweave_ray.api.app import create_app
from torchweave_ray.bench.load.targets import run_in_loop
from torchweave_ray.bench.transport.echo import ECHO_ENGINE, load_echo
from torchweave_ray.build import build_engine
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer


async def run(port: int, step_s: float) -> None:
    """Until SIGTERM."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_echo(step_s, Path(folder))
        tokenizer = load_tokenizer(Path(folder))
    engine = AsyncEngine(build_engine(loaded, ECHO_ENGINE, tokenizer), loaded.info)
    engine.start()

    async def tokenizer_of(model: str) -> Tokenizer:
        return tokenizer

    config = uvicorn.Config(
        create_app(engine, tokenizer_of), port=port, log_level="warning", lifespan="off"
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=25.0)
    arguments = parser.parse_args()
    run_in_loop(run(arguments.port, arguments.step_ms / 1e3))
