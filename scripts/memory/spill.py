"""Seconds to the first token of a long prompt whose KV blocks are nowhere, on a disk, in its page
cache, or in memory: `memory/spill.py ARTIFACT [--save]`. Backs figures of docs/performance.md."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchweave_ray.bench.origin import save_results
from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams

ROUNDS = 3
PROMPT_TOKENS = (512, 1024, 2048)
KV_MEMORY = 512 << 20
ONE = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def prompt_of(num: int, seed: int) -> tuple[int, ...]:
    return tuple((seed * 7919 + i * 31) % 40_000 + 100 for i in range(num))


def first_token_s(llm: LLM, prompt: tuple[int, ...], num_cached: int) -> float:
    start = time.perf_counter()
    (completion,) = llm.generate([prompt], ONE)
    seconds = time.perf_counter() - start
    assert completion.num_cached_tokens >= num_cached - 16, completion.num_cached_tokens
    assert num_cached or not completion.num_cached_tokens
    return seconds


def opened(artifact: Path, folder: Path) -> LLM:
    cache = {"kv_memory": KV_MEMORY, "spill": {"path": str(folder), "max_bytes": 2 << 30}}
    llm = LLM(artifact, cache=cache)
    llm.generate([prompt_of(64, 999)], ONE)  # the first step of an engine is no prompt's
    return llm


def drop_pages(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(artifact: Path) -> list[dict[str, Any]]:
    prompts = [(num, prompt_of(num, r * 10 + num)) for num in PROMPT_TOKENS for r in range(ROUNDS)]
    seconds: dict[tuple[str, int], list[float]] = {}

    def note(where: str, llm: LLM) -> None:
        for num, prompt in prompts:
            taken = first_token_s(llm, prompt, 0 if where == "nowhere" else num)
            seconds.setdefault((where, num), []).append(taken)

    with tempfile.TemporaryDirectory(dir=artifact.parent) as name:
        folder = Path(name)
        with opened(artifact, folder) as llm:
            note("nowhere", llm)
            note("memory", llm)
            start = time.perf_counter()
        saved_s = time.perf_counter() - start
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        with opened(artifact, folder) as llm:
            note("page cache", llm)
        drop_pages(folder)
        with opened(artifact, folder) as llm:
            note("disk", llm)
    points = [_point(*key, values) for key, values in seconds.items()]
    return [*points, {"state": "saved at close", "s": round(saved_s, 3), "bytes": num_bytes}]


def _point(where: str, num: int, values: Sequence[float]) -> dict[str, Any]:
    first_token = {"p50": statistics.median(values), "max": max(values)}
    rounded = {name: round(value, 4) for name, value in first_token.items()}
    return {"blocks": where, "prompt_tokens": num, "first_token_s": rounded}


def main() -> None:
    points = measure(Path(sys.argv[1]))
    for point in points:
        print(point)
    if "--save" in sys.argv:
        config = {
            "artifact": Path(sys.argv[1]).name,
            "kv_memory": KV_MEMORY,
            "rounds": ROUNDS,
            "load_average": os.getloadavg()[0],
        }
        print(save_results("spill-cost", config, points))


if __name__ == "__main__":
    main()
