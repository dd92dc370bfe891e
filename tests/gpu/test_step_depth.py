"""Scheduling a step before the last one is done changes no text. On a CPU, with a real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_artifact
from torchweave_ray.errors import ConfigError
from torchweave_ray.llm import LLM, Completion
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer.grammar import choice_spec

LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PARAMS = [
    LONG,
    SamplingParams(temperature=0.9, seed=3, max_tokens=24, top_p=0.9),
    SamplingParams(temperature=0.8, seed=4, max_tokens=24, logprobs=2),
    SamplingParams(
        temperature=0.7, seed=5, max_tokens=24, repetition_penalty=1.3, frequency_penalty=0.2
    ),
    SamplingParams(temperature=0.0, max_tokens=24, bad_words=((17,), (40, 41))),
    SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=24, stop=("e",)),
]
PROMPTS = [[3 + i, 9, 27, 81, 5 * i] * (i + 2) for i in range(len(PARAMS))]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16)


def _answers(artifact: Path, step_depth: int) -> list[Completion]:
    """All at once, in few slots and little memory: waiting, preemption, leaving."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 24}
    cache = {"kv_memory": 40 * 8192, "enable_prefix_caching": True}
    runner = {"step_depth": step_depth}
    with LLM(artifact, scheduler=options, cache=cache, runner=runner) as llm:
        answers = llm.generate(PROMPTS, PARAMS)
        grammar = choice_spec(["gravity pulls", "gravity pushes"])
        return answers + llm.generate([PROMPTS[0], PROMPTS[1]], LONG, grammar=[grammar, None])


def test_texts_are_the_same(artifact: Path) -> None:
    at_once, ahead = (_answers(artifact, depth) for depth in (0, 1))
    assert [a.token_ids for a in ahead] == [a.token_ids for a in at_once]
    assert ahead == at_once


def test_it_does_not_go_with_guesses(artifact: Path) -> None:
    with pytest.raises(ConfigError, match="step_depth 1 does not go with"):
        LLM(artifact, runner={"step_depth": 1}, speculation={"method": "ngram"})
