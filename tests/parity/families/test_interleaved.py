"""Models of sliding and full layers: what fell out of the window is let go of in the former only,
and no text changes for it, whatever else goes on in the cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES
from tests.kernels.native import NativeDecoder, random_texts
from tests.parity.families.test_families import reference
from tests.parity.paged import Text
from tests.speculation.test_same_text import guess_at_random
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.kernels.library import KernelsUnavailable, load_library
from torchweave_ray.llm import LLM
from torchweave_ray.outputs import GenerateRequest, OutputKind
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

INTERLEAVED = ("gemma2", "gemma3", "qwen2-window")
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
BLOCK_BYTES = 2 * 2 * 2 * 16 * 32 * 2  # gemma3's in bf16: two layers of a group
KEPT = 5
"""Blocks: a window of 12 and 64 positions more."""


def options(num_blocks: int = 400, chunk: int = 48, **more: Any) -> dict[str, Any]:
    return {
        "max_model_len": 400,
        "cache": {"kv_memory": num_blocks * BLOCK_BYTES, "watermark": 0.0},
        "runner": {"threads": 1},
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": chunk},
        **more,
    }


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("interleaved")
    return make_tiny_artifact(folder, dtype=torch.bfloat16, **FAMILIES["gemma3"])


@pytest.mark.parametrize("name", INTERLEAVED)
@torch.inference_mode()
def test_greedy_ids_equal_transformers(tmp_path: Path, name: str) -> None:
    """Of texts many windows long, computed beside each other."""
    texts = random_texts(190, 240)
    model = reference(make_checkpoint(tmp_path / "checkpoint", **FAMILIES[name]))
    ids = [
        model.generate(torch.tensor([t]), max_new_tokens=40, do_sample=False, eos_token_id=None)
        for t in texts
    ]
    artifact = make_tiny_artifact(tmp_path / "artifact", **FAMILIES[name])
    with LLM(artifact, **options()) as llm:
        groups = llm._loaded.runner.limits.groups
        assert (groups.num_full, groups.num_sliding, groups.kept_blocks) == (1, 1, KEPT)
        for text, found, whole in zip(texts, llm.generate(texts, GREEDY), ids, strict=True):
            assert [*text, *found.token_ids] == whole[0].tolist()


@pytest.mark.parametrize("name", INTERLEAVED)
def test_native_ids_are_those_of_a_cache_that_keeps_all(tmp_path: Path, name: str) -> None:
    try:
        library = load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    artifact = make_tiny_artifact(tmp_path, dtype=torch.bfloat16, **FAMILIES[name])
    (text,) = random_texts(230)
    decoder, whole = NativeDecoder(artifact, library), Text(list(text))
    decoder.step([(whole, 229)])
    for _ in range(40):
        whole.token_ids.append(int(decoder.step([(whole, 1)])[0].argmax()))
    with LLM(artifact, **options()) as llm:
        (found,) = llm.generate([text], GREEDY)
    assert [*text, *found.token_ids] == whole.token_ids


def engine_of(artifact: Path, **config: Any) -> Engine:
    parsed = EngineConfig.from_dict(config)
    return build_engine(load_model(artifact, parsed), parsed, load_tokenizer(artifact))


def test_only_sliding_layers_let_go(native: Path) -> None:
    engine = engine_of(native, **options())
    (text,) = random_texts(300)
    engine.add(GenerateRequest("a", "", tuple(text), replace(GREEDY, max_tokens=100)))
    most = 0
    while engine.has_work:
        engine.step()
        for seq in engine._scheduler.running:
            stats, num_computed = engine.stats(), seq.num_computed_tokens
            full, sliding = -(-num_computed // 16), min(KEPT, num_computed // 16) + 1
            held = stats.num_blocks - stats.num_free_blocks
            assert full + sliding - 1 <= held <= full + sliding
            assert all(len(table) == full for table in seq.block_tables)
            most = max(most, held)
    assert most == 25 + KEPT + 1  # in place of 2 * 25
    assert engine.stats().num_cacheable_tokens == engine.stats().num_blocks * 16 // 2
    engine.check_integrity()
    engine.close()


def test_windows_leave_room_for_others(native: Path) -> None:
    """Five texts of 16 blocks in each group, in 120: whole they would take 160."""
    prompts = random_texts(*[180] * 5)
    params = replace(GREEDY, max_tokens=70)
    with LLM(native, **options(400)) as llm:
        expected = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    with LLM(native, **options(120)) as llm:
        assert [each.token_ids for each in llm.generate(prompts, params)] == expected
        assert (llm.stats().num_blocks, llm.stats().num_preemptions) == (120, 0)
        assert llm.stats().num_free_blocks == 120


def random_request(rng: random.Random, number: int) -> GenerateRequest:
    stem = [5 + i % 200 for i in range(rng.choice([0, 64, 130, 200]))]
    prompt = (*stem, *(rng.randrange(3, 300) for _ in range(rng.randint(1, 60))))
    sampling = SamplingParams(
        max_tokens=rng.randint(1, 80),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        seed=number,
        ignore_eos=True,
        logprobs=rng.choice([None, 0]),
        prompt_logprobs=0 if number % 10 == 3 else None,
    )
    request = GenerateRequest(f"r{number}", "", prompt, sampling, priority=rng.choice([0, 1]))
    if number % 10 == 3:
        return replace(request, output_kind=OutputKind.PROMPT_LOGPROBS)
    if number % 4 == 0:
        return replace(request, n=rng.randint(2, 4))
    return request


def answers(engine: Engine, requests: Sequence[GenerateRequest], at_once: int) -> dict[Any, Any]:
    """By request and choice: tokens and logprobs; by request: those of the prompt."""
    found: dict[Any, Any] = {}
    waiting = list(reversed(requests))
    while waiting or engine.has_work:
        while waiting and len(engine._states) < at_once:
            engine.add(waiting.pop())
        for output in engine.step():
            if output.prompt_logprobs:
                found[output.request_id] = output.prompt_logprobs
            for delta in output.deltas:
                assert delta.error is None
                entry = found.setdefault((output.request_id, delta.index), [])
                logprobs = delta.logprobs or [None] * len(delta.token_ids)
                entry += zip(delta.token_ids, logprobs, strict=True)
        engine.check_integrity()
    return found


@pytest.fixture(scope="module")
def requests() -> list[GenerateRequest]:
    rng = random.Random(7)
    return [random_request(rng, number) for number in range(24)]


@pytest.fixture(scope="module")
def alone(native: Path, requests: list[GenerateRequest]) -> Callable[[str], dict[Any, Any]]:
    """By the cache's type, what each gives that has the engine to itself and finds nothing."""

    @cache
    def of(kv: str) -> dict[Any, Any]:
        plain = options(runner={"threads": 1, "kv_dtype": kv})
        plain["cache"]["enable_prefix_caching"] = False
        engine = engine_of(native, **plain)
        found = answers(engine, requests, 1)
        assert engine.stats().num_prefix_hit_tokens == 0
        engine.close()
        return found

    return of


@pytest.mark.parametrize(
    ("kv", "method"), [("model", "none"), ("model", "ngram"), ("model", "draft"), ("int8", "ngram")]
)
def test_no_text_changes_whatever_goes_on_in_the_cache(
    tmp_path: Path,
    native: Path,
    requests: list[GenerateRequest],
    alone: Callable[[str], dict[Any, Any]],
    kv: str,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forks, hits, preemption, drafts that are right or wrong, a sleep, in a tight pool."""
    guess_at_random(monkeypatch, 0, 0.8)
    num_blocks, model = 50, {}
    if method == "draft":  # a block of its own beside each, in fp32
        num_blocks *= 3
        model = {"model": str(make_tiny_artifact(tmp_path / "small", **FAMILIES["gemma3"]))}
    tight = options(num_blocks, runner={"threads": 1, "kv_dtype": kv})
    if kv == "int8":
        tight["cache"]["kv_memory"] = num_blocks * BLOCK_BYTES * 9 // 16  # with scales
    tight["speculation"] = {"method": method, "max_draft_tokens": 5, **model}
    engine = engine_of(native, **tight)
    found = answers(engine, requests[:12], 8)
    engine.rest.sleep()
    found |= answers(engine, requests[12:], 8)
    assert found == alone(kv)
    stats = engine.stats()
    assert stats.num_blocks == stats.num_free_blocks == 50
    assert min(stats.num_preemptions, stats.num_prefix_hit_tokens, stats.num_wakes) > 0
    if method == "ngram":
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    elif method == "draft":
        assert stats.num_accepted_tokens > 0
    engine.close()
