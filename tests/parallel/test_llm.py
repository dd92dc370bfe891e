"""Two ranks, two processes, one `LLM`: what it answers is what one process does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.families import FAMILIES
from tests.speculation.test_same_text import guess_at_random
from tests.tiny import make_tiny_artifact
from torchweave_ray.errors import ConfigError
from torchweave_ray.llm import LLM, Completion
from torchweave_ray.sampling_params import SamplingParams

PROMPTS = [list(range(10, 10 + n)) for n in (40, 3, 17, 60, 25, 48)]
BLOCK_BYTES = 2 * 2 * 16 * 16 * 4
"""Of one KV head: keys and values, layers, positions, dimensions, fp32."""
NUM_BLOCKS = 24


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("tp") / "tiny", vocab_size=301)


def open_llm(artifact: Path, num_ranks: int, method: str = "none", **options: Any) -> LLM:
    """With the same few blocks, whoever holds them."""
    draft = {"model": str(artifact)} if method == "draft" else {}
    return LLM(
        artifact,
        max_model_len=128,
        tensor_parallel_size=num_ranks,
        cache={"kv_memory": NUM_BLOCKS * BLOCK_BYTES * 2 // num_ranks},
        scheduler={"max_num_batched_tokens": 48},
        runner={"executor": "torch", "threads": 2, **options},
        speculation={"method": method, **draft},
    )


@pytest.fixture(scope="module")
def one(artifact: Path) -> Iterator[LLM]:
    with open_llm(artifact, 1) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(artifact: Path) -> Iterator[LLM]:
    """A step ahead: tokens that are still being drawn travel like those that are known."""
    with open_llm(artifact, 2, step_depth=1) as llm:
        assert llm._loaded.runner.limits.step_depth == 1
        yield llm


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    assert all(completion.error is None for completion in completions)
    return [completion.token_ids for completion in completions]


def test_greedy_texts_and_logprobs(one: LLM, two: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=3)
    wanted, found = (llm.generate(PROMPTS, params) for llm in (one, two))
    assert ids(found) == ids(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.logprobs is not None
        assert other.logprobs is not None
        for a, b in zip(mine.logprobs, other.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4
    assert two.info.executor == "torch tp2"
    assert two.info.numerics_id != one.info.numerics_id
    assert two._loaded.runner.limits.num_blocks == one._loaded.runner.limits.num_blocks


def test_seeded_draws(one: LLM, two: LLM) -> None:
    params = [
        SamplingParams(
            temperature=0.9, top_p=0.9, seed=7 + i, max_tokens=20, repetition_penalty=1.1
        )
        for i in range(len(PROMPTS))
    ]
    assert ids(two.generate(PROMPTS, params)) == ids(one.generate(PROMPTS, params))


def test_preempted_and_cached_sequences(one: LLM, two: LLM) -> None:
    """All do not fit at once; what is computed again, or is cached, is the same on both ranks."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    before = two.stats().num_preemptions
    assert ids(two.generate(PROMPTS, params)) == ids(one.generate(PROMPTS, params))
    assert two.stats().num_preemptions > before
    short = SamplingParams(temperature=0.0, max_tokens=4)
    first, again = (two.generate([PROMPTS[3]], short)[0] for _ in range(2))
    assert again.num_cached_tokens >= 48
    assert again.token_ids == first.token_ids


def test_prompt_logprobs(one: LLM, two: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    (wanted,), (found,) = (llm.generate([PROMPTS[0]], params) for llm in (one, two))
    assert wanted.prompt_logprobs is not None
    assert found.prompt_logprobs is not None
    for mine, other in zip(found.prompt_logprobs[1:], wanted.prompt_logprobs[1:], strict=True):
        assert mine is not None
        assert other is not None
        assert abs(mine.logprob - other.logprob) < 1e-4


def test_it_sleeps_and_wakes_with_all_ranks(two: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    before = ids(two.generate(PROMPTS, params))
    two.sleep()
    assert two.is_sleeping
    assert ids(two.generate(PROMPTS, params)) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_guesses_change_no_text(
    artifact: Path, one: LLM, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft model runs on rank 0 alone; here it is the served one."""
    guess_at_random(monkeypatch, 0, 0.7)
    words = (7, 8, 9)  # that an n-gram comes again
    params = SamplingParams(
        temperature=0.0, max_tokens=40, ignore_eos=True, allowed_token_ids=words
    )
    prompts = [[7, 8, 9] * 6, PROMPTS[1]]
    with open_llm(artifact, 2, method) as llm:
        assert ids(llm.generate(prompts, params)) == ids(one.generate(prompts, params))
        assert llm.stats().num_accepted_tokens > 0


@pytest.mark.slow
def test_layers_of_two_kv_groups(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path, **FAMILIES["gemma3"])
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[3 + (7 * i + n) % 290 for i in range(n)] for n in (150, 180, 120)]
    found = []
    for num_ranks in (1, 2):
        with LLM(artifact, tensor_parallel_size=num_ranks, runner={"executor": "torch"}) as llm:
            assert llm._loaded.runner.limits.groups.num == 2
            found.append(ids(llm.generate(prompts, params)))
    assert found[0] == found[1]


def test_a_model_that_cannot_be_cut_starts_no_process(artifact: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size 4 does not divide"):
        open_llm(artifact, 4)
    with pytest.raises(ConfigError, match="tensor_parallel_size must be at least 1"):
        LLM(artifact, tensor_parallel_size=0)
