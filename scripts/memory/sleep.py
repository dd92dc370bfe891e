"""Memory of an engine awake and asleep, and how soon it answers again: `memory/sleep.py ARTIFACT...
[--save]`. Backs the figures of docs/operations.md."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from torchweave_ray.bench.origin import save_results
from torchweave_ray.bench.process_tree import memory_of
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

ROUNDS = 3
PROMPT_TOKENS, OUTPUT_TOKENS, CLIENTS = 512, 64, 4
KV_MEMORY = 512 << 20


def memory() -> dict[str, float]:
    """MiB of this process: resident, and its own alone."""
    found = memory_of(os.getpid())
    return {"rss_mib": round(found.rss / 2**20), "uss_mib": round(found.uss / 2**20)}


async def answer(engine: AsyncEngine, name: str, is_probe: bool = False) -> float:
    """Seconds to the first token; a probe is short."""
    num_prompt, num_tokens = (16, 1) if is_probe else (PROMPT_TOKENS, OUTPUT_TOKENS)
    start, first = time.perf_counter(), 0.0
    seed = sum(map(ord, name))
    prompt = tuple((seed * 7919 + i * 31) % 40_000 + 100 for i in range(num_prompt))
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    async for output in engine.generate(GenerateRequest(name, "", prompt, sampling)):
        if not first and any(delta.token_ids for delta in output.deltas):
            first = time.perf_counter() - start
    return first


async def measure(artifact: Path) -> list[dict[str, Any]]:
    config = EngineConfig.from_dict({"cache": {"kv_memory": KV_MEMORY}})
    points = [{"artifact": artifact.name, "state": "before loading", **memory()}]
    loaded = load_model(artifact, config)
    engine = build_engine(loaded, config, load_tokenizer(artifact))
    served = AsyncEngine(engine, loaded.info)
    served.start()
    for index in range(ROUNDS):
        await asyncio.gather(*(answer(served, f"{index}-{i}") for i in range(CLIENTS)))
        awake = await answer(served, f"{index}-awake", True)
        point = {"artifact": artifact.name, "executor": loaded.info.executor, "round": index}
        points.append(point | {"state": "awake", "first_token_s": round(awake, 3), **memory()})
        assert all(*(await served.sleeping(None, True)).values())
        points.append(point | {"state": "asleep", **memory()})
        woken = await answer(served, f"{index}-woken", True)
        points.append(point | {"state": "woken", "first_token_s": round(woken, 3), **memory()})
    served.close()
    loaded.lease.release()
    return points


def main() -> None:
    points = []
    for name in (word for word in sys.argv[1:] if not word.startswith("-")):
        points += asyncio.run(measure(Path(name)))
    for point in points:
        print(point)
    if "--save" in sys.argv:
        config = {
            "kv_memory": KV_MEMORY,
            "prompt_tokens": PROMPT_TOKENS,
            "clients": CLIENTS,
            "load_average": os.getloadavg()[0],
        }
        print(save_results("sleep-cost", config, points))


if __name__ == "__main__":
    main()
