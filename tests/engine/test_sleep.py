"""A model that sleeps: file unmapped, KV cache gone; the next request finds all as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lora.adapters import make_adapter
from tests.speculation.test_same_text import guess_at_random
from tests.tiny import make_tiny_artifact
from torchweave_ray.build import LoadedModel, build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.errors import EngineDead
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import WEIGHTS
from torchweave_ray.outputs import GenerateRequest, RequestOutput, merge_outputs
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

TEXT = tuple(range(3, 60))
Drive = Callable[[AsyncEngine, LoadedModel], Coroutine[Any, Any, None]]


def run(
    artifact: Path,
    drive: Drive,
    executor: str = "native",
    after_s: float | None = None,
    **lora: Any,
) -> None:
    options = {
        "runner": {"threads": 1, "executor": executor},
        "cache": {"kv_memory": 1 << 22},
        "lora": lora,
    }
    config = EngineConfig.from_dict(options)
    loaded = load_model(artifact, config)

    async def go() -> None:
        engine = build_engine(loaded, config, load_tokenizer(artifact))
        served = AsyncEngine(engine, loaded.info, sleep_after_s=after_s)
        served.start()
        try:
            await drive(served, loaded)
        finally:
            served.close()

    asyncio.run(go())


async def ask(
    engine: AsyncEngine, request_id: str, num: int = 8, adapter: str = ""
) -> RequestOutput:
    sampling = SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True, logprobs=0)
    model = f"tiny:{adapter}" if adapter else "tiny"
    request = GenerateRequest(request_id, model, TEXT, sampling, adapter=adapter)
    return merge_outputs([output async for output in engine.generate(request)])


async def sleeping(engine: AsyncEngine, want: bool | None = None) -> bool:
    (is_asleep,) = (await engine.sleeping(None, want))["tiny"]
    return is_asleep


def is_mapped(artifact: Path) -> bool:
    return str(artifact / WEIGHTS) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("executor", "dtype"), [("native", torch.bfloat16), ("torch", torch.float32)]
)
def test_it_sleeps_when_told_and_wakes_for_a_request(
    tmp_path: Path, executor: str, dtype: torch.dtype
) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=dtype)
    make_adapter(tmp_path / "adapters" / "red", artifact)

    async def drive(engine: AsyncEngine, loaded: LoadedModel) -> None:
        before = [await ask(engine, f"{i}{a}", adapter=a) for i in range(2) for a in ("", "red")]
        assert before[-1].usage is not None
        assert before[-1].usage.cached_tokens == 48
        assert not await sleeping(engine)
        assert await sleeping(engine, True)
        assert loaded.runner._kv_cache.num_bytes == 0
        assert not is_mapped(artifact)
        assert engine.snapshot().num_free_blocks == engine.snapshot().num_blocks
        engine.check_health()
        for name in ("", "red"):
            after = await ask(engine, f"after{name}", adapter=name)
            assert after.deltas == before[bool(name)].deltas
            assert after.usage is not None
            assert after.usage.cached_tokens == 0
        assert not await sleeping(engine)
        assert await sleeping(engine, True)
        assert not await sleeping(engine, False)
        assert (await ask(engine, "last")).deltas == before[0].deltas

    run(artifact, drive, executor, source=str(tmp_path / "adapters"))


def test_it_does_not_sleep_over_work_and_sleeps_by_itself_when_idle(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)

    async def drive(engine: AsyncEngine, loaded: LoadedModel) -> None:
        asking = asyncio.create_task(ask(engine, "long", 400))
        while not engine.snapshot().num_running:
            await asyncio.sleep(0)
        assert not await sleeping(engine, True)
        assert len((await asking).deltas[0].token_ids) == 400
        while not await sleeping(engine):
            await asyncio.sleep(1.1)  # asking keeps the thread from being idle for that second

    run(artifact, drive, after_s=0.5)


def test_whoever_comes_while_it_wakes_is_answered(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)

    async def drive(engine: AsyncEngine, loaded: LoadedModel) -> None:
        before = (await ask(engine, "before")).deltas
        for turn in range(3):
            asleep = asyncio.create_task(sleeping(engine, True))
            asked = [asyncio.create_task(ask(engine, f"{turn}-{i}")) for i in range(3)]
            asleep_again = asyncio.create_task(sleeping(engine, True))
            assert [answer.deltas for answer in await asyncio.gather(*asked)] == [before] * 3
            await asleep
            await asleep_again
        assert engine.snapshot().num_wakes in (2, 3)  # a turn's first request may precede its sleep

    run(artifact, drive)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_llm_with_a_draft_model(
    tmp_path: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    guess_at_random(monkeypatch, 1, 1.0)
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)
    draft = make_tiny_artifact(tmp_path / "small", dtype=torch.bfloat16, num_hidden_layers=1)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=40, ignore_eos=True)
    speculation = {"method": "draft", "model": str(draft)}
    cache = {"kv_memory": 1 << 22}
    with LLM(artifact, speculation=speculation, cache=cache, runner={"threads": 1}) as llm:
        (before,) = llm.generate([TEXT], params)
        for _ in range(2):
            llm.sleep()
            assert llm.is_sleeping
            assert not is_mapped(artifact)
            assert not is_mapped(draft)
            (after,) = llm.generate([TEXT], params)
            assert after.token_ids == before.token_ids
            assert not llm.is_sleeping
        llm.sleep()
        llm.wake()
        assert not llm.is_sleeping
        assert llm.stats().num_wakes == 3
        assert llm.stats().num_draft_tokens > 0


def test_weights_that_were_altered_meanwhile_do_not_wake(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)

    async def drive(engine: AsyncEngine, loaded: LoadedModel) -> None:
        await ask(engine, "a")
        assert await sleeping(engine, True)
        weights = artifact / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x01\x02\x03")
        asked = asyncio.create_task(ask(engine, "b"))
        with pytest.raises(EngineDead, match="was altered"):
            await sleeping(engine, False)
        with pytest.raises(EngineDead, match="was altered"):
            await asked
        with pytest.raises(EngineDead, match="was altered"):
            engine.check_health()

    run(artifact, drive)
