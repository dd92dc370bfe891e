"""A batch over a Ray cluster by Ray Data: so many engines, each answering blocks of lines.

Ray Data is optional (`pip install "torchweave-ray[batch]"`). It replaces a worker that dies and
gives its lines to another. Knows nothing of the files.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchweave_ray.batch.answering import Ask
from torchweave_ray.batch.lines import BadLine, BatchRequest, Line, result_of
from torchweave_ray.batch.run import answer_line
from torchweave_ray.errors import ConfigError

BATCH = 16
"""Lines of one call; Ray Data has four calls of a worker open, so that its engine stays busy."""
LINES_IN_BLOCK = 64
"""What a worker takes at a time, and what is done again when it dies."""
COLUMNS = ("key", "custom_id", "url", "body")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    artifact: str
    engine: dict[str, Any]
    """An `EngineConfig` as nested mappings."""
    model_id: str | None


class BatchWorker:
    """Ray Data calls it with columns; all its calls share one loop, and with it one engine."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = WorkerConfig(**config)
        self._stack = AsyncExitStack()
        self._ask: asyncio.Task[Ask] | None = None

    async def __call__(self, columns: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        if self._ask is None:
            self._ask = asyncio.create_task(self._start())
        ask = await self._ask
        lines = [
            Line(key, custom_id, BatchRequest(url, bytes(body)))
            for key, custom_id, url, body in zip(*(columns[c] for c in COLUMNS), strict=True)
        ]
        results = await asyncio.gather(*(answer_line(line, ask) for line in lines))
        yield {
            "key": [line.key for line in lines],
            "result": [json.dumps(result) for result in results],
        }

    async def _start(self) -> Ask:
        from torchweave_ray.batch.local import local_engine
        from torchweave_ray.config import EngineConfig

        config = EngineConfig.from_dict(self._config.engine)
        artifact = Path(self._config.artifact)
        return await self._stack.enter_async_context(
            local_engine(artifact, config, self._config.model_id)
        )


def results_by_ray_data(
    lines: Sequence[Line], config: WorkerConfig, num_workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(a line's key, its result), in any order. Starts a Ray here unless RAY_ADDRESS names one.

    Raises ConfigError when Ray Data cannot be imported.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"--workers needs Ray Data ({error}): pip install 'torchweave-ray[batch]'"
        ) from error
    rows = []
    for line in lines:
        if isinstance(line.wanted, BadLine):
            yield line.key, result_of(line, line.wanted)
        else:
            wanted = line.wanted
            rows.append(
                dict(zip(COLUMNS, (line.key, line.custom_id, wanted.url, wanted.body), strict=True))
            )
    if not rows:
        return
    was_running = ray.is_initialized()
    if not was_running:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        blocks = math.ceil(len(rows) / LINES_IN_BLOCK)
        answered = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            BatchWorker,
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=min(1.0, ray.cluster_resources().get("CPU", 1) / num_workers),
            fn_constructor_args=(asdict(config),),
        )
        for row in answered.iter_rows():
            yield row["key"], json.loads(row["result"])
    finally:
        if not was_running:
            ray.shutdown()
