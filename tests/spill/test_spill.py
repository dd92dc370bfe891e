"""A prefix cache that outlives its engine: texts stay equal, whatever the disk has or lost."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES
from tests.tiny import make_tiny_artifact
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.engine.memory import spill
from torchweave_ray.errors import ConfigError
from torchweave_ray.llm import LLM, Completion
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.runner.block_file import BlockFile
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

LONG = tuple(i % 250 + 3 for i in range(200))
"""12 full blocks that may be found, and a rest."""
NUM_FOUND = 192
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("m") / "tiny", dtype=torch.bfloat16)


def options(
    folder: Path | None, executor: str = "native", kv: str = "model", **cache: Any
) -> dict[str, Any]:
    place = {} if folder is None else {"spill": {"path": str(folder), "max_bytes": 1 << 22}}
    return {
        "cache": {"kv_memory": 1 << 22, **place, **cache},
        "runner": {"threads": 1, "executor": executor, "kv_dtype": kv},
    }


def answers(llm: LLM, prompt: tuple[int, ...] = LONG) -> list[Completion]:
    return [llm.generate([prompt], params)[0] for params in (GREEDY, SEEDED)]


def said(completions: list[Completion]) -> list[Any]:
    return [(each.token_ids, each.logprobs) for each in completions]


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("kv", ["model", "int8"])
def test_the_next_process_finds_what_the_last_one_had(
    tmp_path: Path, artifact: Path, executor: str, kv: str
) -> None:
    with LLM(artifact, **options(tmp_path, executor, kv)) as llm:
        before = answers(llm)
        assert [each.num_cached_tokens for each in before] == [0, NUM_FOUND]
        assert llm.stats().num_restored_tokens == 0
    for _ in range(2):
        with LLM(artifact, **options(tmp_path, executor, kv)) as llm:
            after = answers(llm)
            assert said(after) == said(before)
            assert [each.num_cached_tokens for each in after] == [NUM_FOUND] * 2
            assert llm.stats().num_restored_tokens == llm.stats().num_prefix_hit_tokens / 2
            assert llm.stats().num_damaged_blocks == 0
            other = answers(llm, LONG[1:])
            assert other[0].num_cached_tokens in (0, NUM_FOUND)  # the second time it is known
            half = answers(llm, (*LONG[:100], *LONG[50:150]))
            assert half[0].num_cached_tokens in (96, NUM_FOUND)


def test_windows_come_back_with_what_full_layers_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of both kinds of layers: the file has all blocks, those before the hit's window are
    not read, and a batch that ends before the window gives nothing yet."""
    model = make_tiny_artifact(tmp_path / "m", dtype=torch.bfloat16, **FAMILIES["gemma3"])
    with LLM(model, **options(tmp_path / "spill")) as llm:
        before = answers(llm)
        assert [each.num_cached_tokens for each in before] == [0, NUM_FOUND]
        block_bytes = llm._loaded.runner.kv_cache.block_bytes
        assert llm._loaded.runner.limits.groups.num_sliding == 1
    for batch in (32 << 20, 5 * block_bytes):
        monkeypatch.setattr(spill, "_BATCH_BYTES", batch)
        with LLM(model, **options(tmp_path / "spill")) as llm:
            after = answers(llm)
            assert said(after) == said(before)
            assert [each.num_cached_tokens for each in after] == [NUM_FOUND] * 2
            assert llm.stats().num_restored_tokens == NUM_FOUND
            half = answers(llm, (*LONG[:150], *LONG[50:100]))
            assert half[0].num_cached_tokens in (144, NUM_FOUND)
            llm._engine.check_integrity()


def test_only_its_own_model_finds_it(tmp_path: Path, artifact: Path) -> None:
    other = make_tiny_artifact(tmp_path / "other" / "tiny", seed=9, dtype=torch.bfloat16)
    folder = tmp_path / "spill"
    with LLM(artifact, **options(folder)) as llm:
        answers(llm)
    (file,) = folder.iterdir()
    with LLM(other, **options(None)) as llm:
        alone = said(answers(llm))
    for changed in (options(folder, "torch"), options(folder, kv="int8"), options(folder)):
        with LLM(other, **changed) as llm:
            found = answers(llm)
            assert found[0].num_cached_tokens == 0
            assert not file.exists()
    assert said(found) == alone


def test_tenants_and_salts_do_not_share_it(tmp_path: Path, artifact: Path) -> None:
    def cached(tenant: str, salt: str) -> int:
        config = EngineConfig.from_dict(options(tmp_path))
        engine = build_engine(load_model(artifact, config), config, load_tokenizer(artifact))
        engine.add(GenerateRequest("a", "tiny", LONG, GREEDY, tenant=tenant, cache_salt=salt))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        engine.check_integrity()
        engine.close()
        usage = outputs[-1].usage
        assert usage is not None
        return usage.cached_tokens

    owners = [("a", ""), ("b", ""), ("a", "x"), ("", "")]
    assert [cached(*owner) for owner in owners] == [0] * 4
    assert [cached(*owner) for owner in owners] == [NUM_FOUND] * 4


def test_damage_costs_time_and_no_text(tmp_path: Path, artifact: Path) -> None:
    with LLM(artifact, **options(tmp_path / "whole")) as llm:
        before = said(answers(llm))
    (file,) = (tmp_path / "whole").iterdir()
    data, rng = file.read_bytes(), random.Random(2)
    num_damaged = num_restored = 0
    for turn in range(8):
        folder = tmp_path / str(turn)
        shutil.copytree(tmp_path / "whole", folder)
        spoiled = bytearray(data[: len(data) * 2 // 3] if turn == 0 else data)
        for _ in range(turn):
            at = rng.randrange(4096, len(spoiled))
            spoiled[at] ^= 1 << rng.randrange(8)
        (folder / file.name).write_bytes(spoiled)
        with LLM(artifact, **options(folder)) as llm:
            assert said(answers(llm)) == before
            num_damaged += llm.stats().num_damaged_blocks
            num_restored += llm.stats().num_restored_tokens
    assert num_damaged > 3
    assert num_restored > 0


def test_two_processes_have_a_file_each(tmp_path: Path, artifact: Path) -> None:
    turned = tuple(reversed(LONG))
    with (
        LLM(artifact, **options(tmp_path)) as first,
        LLM(artifact, **options(tmp_path)) as second,
    ):
        before = said(answers(first)), said(answers(second, turned))
    assert len(list(tmp_path.iterdir())) == 2
    with (
        LLM(artifact, **options(tmp_path)) as first,
        LLM(artifact, **options(tmp_path)) as second,
    ):
        for llm in (first, second):
            assert (said(answers(llm)), said(answers(llm, turned))) == before
        assert {each.stats().num_restored_tokens for each in (first, second)} == {NUM_FOUND}


def test_the_file_is_bounded_and_keeps_beginnings(tmp_path: Path, artifact: Path) -> None:
    small = options(tmp_path)
    with LLM(artifact, **options(None)) as llm:
        block_bytes = llm._loaded.runner.kv_cache.block_bytes
    small["cache"]["spill"]["max_bytes"] = 4096 + 5 * (block_bytes + 64)
    with LLM(artifact, **small) as llm:
        before = said(answers(llm))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size <= small["cache"]["spill"]["max_bytes"]
    with LLM(artifact, **small) as llm:
        after = answers(llm)
        assert said(after) == before
        assert after[0].num_cached_tokens == 5 * 16
        llm.generate([tuple(reversed(LONG))], GREEDY)
    assert file.stat().st_size <= small["cache"]["spill"]["max_bytes"]


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that reads once the event is set."""
    event, read = threading.Event(), BlockFile.read

    def late(self: BlockFile, block_hash: bytes) -> memoryview | None:
        event.wait()
        return read(self, block_hash)

    monkeypatch.setattr(BlockFile, "read", late)
    yield event
    event.set()


def run(artifact: Path, folder: Path, drive: Any) -> None:
    config = EngineConfig.from_dict(options(folder))
    loaded = load_model(artifact, config)

    async def go() -> None:
        engine = AsyncEngine(build_engine(loaded, config, load_tokenizer(artifact)), loaded.info)
        engine.start()
        try:
            await drive(engine)
        finally:
            engine.close()

    asyncio.run(go())


async def ask(engine: AsyncEngine, name: str, prompt: tuple[int, ...] = LONG) -> tuple[Any, int]:
    tokens: list[int] = []
    async for output in engine.generate(GenerateRequest(name, "tiny", prompt, GREEDY)):
        tokens += [token for delta in output.deltas for token in delta.token_ids]
    assert output.usage is not None
    return tokens, output.usage.cached_tokens


def test_others_go_on_while_a_prompt_waits_for_the_disk(
    tmp_path: Path, artifact: Path, blocked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(artifact, **options(tmp_path)) as llm:
        before = answers(llm)[0]

    async def drive(engine: AsyncEngine) -> None:
        waiting = [asyncio.create_task(ask(engine, f"a{i}")) for i in range(3)]
        _, cached = await ask(engine, "b", (9, 8, 7))
        assert cached == 0
        assert not any(each.done() for each in waiting)
        left = asyncio.create_task(ask(engine, "left", LONG[:150]))
        await asyncio.sleep(0.05)
        left.cancel()
        blocked.set()
        for answer in await asyncio.gather(*waiting):
            assert answer == (list(before.token_ids), NUM_FOUND)
        assert engine.snapshot().num_restored_tokens == NUM_FOUND

    monkeypatch.setattr(spill, "_PATIENCE_S", 60.0)
    run(artifact, tmp_path, drive)


def test_a_disk_that_hangs_is_not_waited_for(
    tmp_path: Path, artifact: Path, blocked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(artifact, **options(tmp_path)) as llm:
        before = answers(llm)[0]

    async def drive(engine: AsyncEngine) -> None:
        assert await ask(engine, "a") == (list(before.token_ids), 0)
        assert (await ask(engine, "b", LONG[:150]))[1] == 144
        blocked.set()
        assert await ask(engine, "c") == (list(before.token_ids), NUM_FOUND)

    monkeypatch.setattr(spill, "_PATIENCE_S", 0.05)
    run(artifact, tmp_path, drive)


def test_an_idle_engine_saves_what_a_crash_would_lose(tmp_path: Path, artifact: Path) -> None:
    async def drive(engine: AsyncEngine) -> None:
        await ask(engine, "a")
        while engine.snapshot().num_saved_blocks < NUM_FOUND // 16:
            await asyncio.sleep(0.05)
        shutil.copytree(tmp_path / "spill", tmp_path / "after-a-crash")
        await engine.sleeping(None, True)  # and what sleeps wakes with it
        assert (await ask(engine, "b"))[1] == NUM_FOUND
        assert engine.snapshot().num_restored_tokens == NUM_FOUND

    run(artifact, tmp_path / "spill", drive)
    with LLM(artifact, **options(tmp_path / "after-a-crash")) as llm:
        assert answers(llm)[0].num_cached_tokens == NUM_FOUND


def test_a_random_load_in_a_tight_cache(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that share beginnings, more than the cache holds, from the disk and not."""
    rng = random.Random(4)
    stems = [[rng.randrange(3, 250) for _ in range(150)] for _ in range(4)]
    prompts = [
        (*rng.choice(stems)[: rng.randrange(1, 150)], *(rng.randrange(3, 250) for _ in range(5)))
        for _ in range(40)
    ]
    with LLM(artifact, **options(None)) as llm:
        alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
        block_bytes = llm._loaded.runner.kv_cache.block_bytes
    monkeypatch.setattr(spill, "_BATCH_BYTES", 3 * block_bytes)
    num_restored = 0
    for _ in range(3):
        tight = options(tmp_path, kv_memory=24 * block_bytes)
        with LLM(artifact, **tight, scheduler={"max_num_seqs": 4}) as llm:
            assert [each.token_ids for each in llm.generate(prompts, GREEDY)] == alone
            llm._engine.check_integrity()
            num_restored += llm.stats().num_restored_tokens
    assert num_restored > 100


def test_what_cannot_be_is_refused_by_name(tmp_path: Path, artifact: Path) -> None:
    for wrong, message in (
        ({"spill": {"max_bytes": 5}}, r"engine\.cache\.spill\.path is required"),
        ({"spill": {"path": "a", "max_byte": 5}}, "did you mean 'max_bytes'"),
        ({"spill": {"path": "a"}, "enable_prefix_caching": False}, "enable_prefix_caching is fal"),
    ):
        with pytest.raises(ConfigError, match=message):
            EngineConfig.from_dict({"cache": wrong})
    with pytest.raises(ConfigError, match="max_bytes 5000 holds no KV block of this model"):
        LLM(artifact, cache={"spill": {"path": str(tmp_path), "max_bytes": 5000}})
