"""Adapters through the whole engine: mixed, evicted, replaced, refused."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lora.adapters import make_adapter
from tests.tiny import make_tiny_artifact
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.errors import ConfigError, InvalidRequest, ModelNotFound
from torchweave_ray.llm import LLM, Completion
from torchweave_ray.outputs import FinishReason, GenerateRequest, merge_outputs
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

NAMES = (None, "red", "green", "blue")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
RUNNER = {"threads": 1}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path, artifact: Path) -> Path:
    for seed, name in enumerate(NAMES[1:]):
        make_adapter(tmp_path / "adapters" / str(name), artifact, rank=2 + seed, seed=seed)
    return tmp_path / "adapters"


def open_llm(artifact: Path, folder: Path, max_loaded: int = 8, **options: Any) -> LLM:
    lora = {"source": str(folder), "max_loaded": max_loaded, "max_rank": 16}
    return LLM(artifact, lora=lora, runner=RUNNER, **options)


def prompts(num: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 300) for _ in range(length)] for _ in range(num)]


def said(completions: Sequence[Completion]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs, c.finish_reason) for c in completions]


def alone(artifact: Path, folder: Path, texts: Any, names: Any, params: Any = GREEDY) -> Any:
    with open_llm(artifact, folder, cache={"enable_prefix_caching": False}) as llm:
        one_by_one = zip(texts, names, strict=True)
        return said([llm.generate([t], params, adapter=n)[0] for t, n in one_by_one])


def test_mixed_in_one_batch_and_taking_turns_equal_each_alone(artifact: Path, folder: Path) -> None:
    texts = prompts(12)
    names = [NAMES[i % 4] for i in range(12)]
    expected = alone(artifact, folder, texts, names)
    assert len({ids for ids, _, _ in alone(artifact, folder, texts[:1] * 4, NAMES)}) == 4
    for max_loaded in (8, 2, 1):
        with open_llm(artifact, folder, max_loaded) as llm:
            assert said(llm.generate(texts, GREEDY, adapter=names)) == expected
            assert llm._engine.adapters.num_loaded == min(3, max_loaded)


def test_on_the_torch_executor_too(tmp_path: Path, folder: Path) -> None:
    """In fp32, whose products may differ in the last bits with the batch: tokens are compared."""
    artifact = make_tiny_artifact(tmp_path / "tiny")
    texts, names = prompts(12), [NAMES[i % 4] for i in range(12)]

    def ids(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
        return [each.token_ids for each in completions]

    options = {"lora": {"source": str(folder), "max_loaded": 2}}
    with LLM(artifact, **options, runner={**RUNNER, "executor": "torch"}) as llm:
        each_alone = zip(texts, names, strict=True)
        expected = [ids(llm.generate([text], GREEDY, adapter=name))[0] for text, name in each_alone]
        assert len({ids(llm.generate(texts[:1], GREEDY, adapter=name))[0] for name in NAMES}) == 4
        assert ids(llm.generate(texts, GREEDY, adapter=names)) == expected


def test_preempted_requests_keep_their_adapters(artifact: Path, folder: Path) -> None:
    texts, names = prompts(6, 60), [NAMES[i % 4] for i in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True, logprobs=0)
    expected = alone(artifact, folder, texts, names, params)
    with open_llm(artifact, folder, cache={"kv_memory": 170_000, "watermark": 0.0}) as llm:
        assert said(llm.generate(texts, params, adapter=names)) == expected
        assert llm.stats().num_preemptions > 0


def test_cached_prefixes_belong_to_one_adapter(artifact: Path, folder: Path) -> None:
    (text,) = prompts(1, 40)
    with open_llm(artifact, folder) as llm:
        for _ in range(2):
            for name in NAMES:
                llm.generate([text], GREEDY, adapter=name)
        assert llm.stats().num_prefix_hit_tokens == 4 * 32


def test_unknown_and_unfit_adapters_are_refused_by_name(artifact: Path, folder: Path) -> None:
    make_adapter(folder / "wide", artifact, rank=17)
    other = make_tiny_artifact(folder.parent / "other", intermediate_size=96)
    make_adapter(folder / "stranger", other)
    make_adapter(folder.parent / "outside", artifact)
    torn = make_adapter(folder / "torn", artifact)
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:900])
    pickled = make_adapter(folder / "pickled", artifact)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with open_llm(artifact, folder) as llm:
        for name in ("yellow", "../outside", "", ".", "red/../red", "a" * 300):
            with pytest.raises(ModelNotFound, match="there is blue, green, "):
                llm.generate("hello", GREEDY, adapter=[name or ".."])
        for name, reason in (
            ("wide", "its rank is 17, lora.max_rank 16"),
            ("stranger", r"it changes model\.layers\.0\.mlp\.gate_proj\.weight of \[96, 64\]"),
            ("torn", "cannot be read"),
            ("pickled", "adapter_model.safetensors is missing"),
        ):
            with pytest.raises(InvalidRequest, match=reason) as caught:
                llm.generate("hello", GREEDY, adapter=name)
            assert caught.value.param == "model"
            assert str(folder) not in str(caught.value)
        assert llm.generate("hello", GREEDY, adapter="red")[0].error is None
    with LLM(artifact, runner=RUNNER) as llm, pytest.raises(ModelNotFound, match="without adapt"):
        llm.generate("hello", GREEDY, adapter="red")
    with pytest.raises(ConfigError, match="no folder here"):
        open_llm(artifact, folder / "missing")
    # A folder that is an adapter itself has that one.
    with open_llm(artifact, folder / "red") as llm:
        assert said(llm.generate("hello", GREEDY, adapter="red"))


def test_a_replaced_adapter_is_used_by_new_requests_only(artifact: Path, folder: Path) -> None:
    """Those in flight keep theirs, also while another name took its place."""
    (text,) = prompts(1, 30)
    (red,) = alone(artifact, folder, [text], ["red"])
    (blue,) = alone(artifact, folder, [text], ["blue"])

    async def run() -> None:
        engine = started(artifact, folder, max_loaded=2)
        first = request(engine, "a", text, "red")
        stream = engine.generate(first)
        outputs = [await anext(stream)]
        old_id = (await engine.info("tiny:red")).adapter_id
        shutil.rmtree(folder / "red")
        shutil.copytree(folder / "blue", folder / "red")
        await asyncio.sleep(1.1)  # a name is looked up once a second
        new = await engine.info("tiny:red")
        assert new.adapter_id == (await engine.info("tiny:blue")).adapter_id != old_id
        assert await ids_of(engine, request(engine, "b", text, "red")) == blue[0]
        with pytest.raises(InvalidRequest, match="here, not wrong") as caught:
            await ids_of(engine, request(engine, "c", text, "red", adapter_id="wrong"))
        assert caught.value.param == "adapter_id"
        outputs += [output async for output in stream]
        assert merge_outputs(outputs).deltas[0].token_ids == red[0]
        # One that goes on from elsewhere finds what is loaded, whatever the name stands for now.
        rest = request(engine, "d", text, "red", adapter_id=old_id, output_token_ids=red[0][:5])
        assert await ids_of(engine, rest) == red[0][5:]
        engine.close()

    asyncio.run(run())


def test_a_removed_adapter_is_gone_by_name_and_requests_in_flight_keep_it(
    artifact: Path, folder: Path
) -> None:
    (text,) = prompts(1, 30)
    (red,) = alone(artifact, folder, [text], ["red"])

    async def run() -> None:
        engine = started(artifact, folder, max_loaded=1)
        stream = engine.generate(request(engine, "a", text, "red"))
        outputs = [await anext(stream)]
        shutil.rmtree(folder / "red")
        await asyncio.sleep(1.1)  # a name is looked up once a second
        with pytest.raises(ModelNotFound, match="no adapter 'red'; there is blue, green"):
            await engine.info("tiny:red")
        waiting = asyncio.create_task(ids_of(engine, request(engine, "b", text, "blue")))
        outputs += [output async for output in stream]
        assert merge_outputs(outputs).deltas[0].token_ids == red[0]
        assert await waiting != red[0]
        assert list(engine._engine.adapters._places) == [
            (await engine.info("tiny:blue")).adapter_id
        ]
        engine.close()

    asyncio.run(run())


def test_an_adapter_that_vanishes_while_a_request_waits_ends_it(
    artifact: Path, folder: Path
) -> None:
    (text,) = prompts(1)

    async def run() -> None:
        engine = started(artifact, folder, max_loaded=1)
        await engine.info("tiny:blue")  # and for a second it is not looked up again
        (folder / "blue" / "adapter_config.json").write_text("{}")
        others = [request(engine, str(i), text, "red") for i in range(3)]
        waiting = last_of(engine, request(engine, "b", text, "blue"))
        output, *rest = await asyncio.gather(waiting, *(ids_of(engine, each) for each in others))
        assert len({*rest}) == 1
        (delta,) = output.deltas
        assert delta.finish_reason is FinishReason.ERROR
        assert delta.error == "adapter 'blue' was replaced while a request waited for it"
        engine.close()

    asyncio.run(run())


def test_many_at_once_with_clients_that_leave(artifact: Path, folder: Path) -> None:
    texts, draw = prompts(24, 25), random.Random(3)
    names = [draw.choice(NAMES) for _ in texts]
    expected = [ids for ids, _, _ in alone(artifact, folder, texts, names)]

    async def one(engine: AsyncEngine, index: int) -> None:
        await asyncio.sleep(draw.random() / 10)
        wanted = request(engine, str(index), texts[index], names[index])
        if index % 3:
            assert await ids_of(engine, wanted) == expected[index]
            return
        stream = engine.generate(wanted)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    async def run() -> None:
        engine = started(artifact, folder, max_loaded=2, max_num_seqs=5)
        await asyncio.gather(*(one(engine, index) for index in range(len(texts))))
        assert [info.id for info in await engine.models()] == [
            "tiny", "tiny:blue", "tiny:green", "tiny:red",
        ]  # fmt: skip
        with pytest.raises(ModelNotFound, match="no adapter 'pink'; there is blue, green, red"):
            await engine.info("tiny:pink")
        assert await engine.drain(5.0)
        engine._engine.check_integrity()
        engine.close()

    asyncio.run(run())


def started(artifact: Path, folder: Path, max_loaded: int, max_num_seqs: int = 8) -> AsyncEngine:
    options = {
        "lora": {"source": str(folder), "max_loaded": max_loaded},
        "runner": RUNNER,
        "scheduler": {"max_num_seqs": max_num_seqs},
        "cache": {"kv_memory": 1 << 20},
    }
    config = EngineConfig.from_dict(options)
    loaded = load_model(artifact, config)
    engine = AsyncEngine(build_engine(loaded, config, load_tokenizer(artifact)), loaded.info)
    engine.start()
    return engine


def request(
    engine: AsyncEngine, request_id: str, text: Sequence[int], adapter: str | None, **fields: Any
) -> GenerateRequest:
    model = f"tiny:{adapter}" if adapter else "tiny"
    return GenerateRequest(request_id, model, tuple(text), GREEDY, adapter=adapter or "", **fields)


async def last_of(engine: AsyncEngine, wanted: GenerateRequest) -> Any:
    return merge_outputs([output async for output in engine.generate(wanted)])


async def ids_of(engine: AsyncEngine, wanted: GenerateRequest) -> tuple[int, ...]:
    ids: tuple[int, ...] = (await last_of(engine, wanted)).deltas[0].token_ids
    return ids
