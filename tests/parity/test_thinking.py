"""The limit of reasoning: what is forced, when, and that nothing about scheduling changes it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.parity.test_sameness import BLOCK_BYTES, run
from tests.tiny import make_tiny_artifact
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.llm import LLM
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams, ThinkingBudget
from torchweave_ray.tokenizer import load_tokenizer
from torchweave_ray.tokenizer.grammar import GrammarSpec

PROMPT_TEXT = "A star is"
PROMPT = tuple(range(40, 60))
CLOSER = (275, 276, 277)
SAMPLING = SamplingParams(temperature=0.9, seed=11, max_tokens=24, ignore_eos=True)
BUDGET = ThinkingBudget(6, ((),), (CLOSER, (278,)))
LIMITED = replace(SAMPLING, thinking=BUDGET)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("thinking") / "tiny")


def _engine(artifact: Path, **options: Any) -> Engine:
    values = {"max_model_len": 64, "cache": {"block_size": 4, "kv_memory": 4 << 20}, **options}
    config = EngineConfig.from_dict({**values, "runner": {"threads": 1}})
    return build_engine(load_model(artifact, config), config, load_tokenizer(artifact))


def _ids(engine: Engine, sampling: SamplingParams, **fields: Any) -> tuple[int, ...]:
    (output,) = run(engine, GenerateRequest("r", "tiny", PROMPT, sampling, **fields))
    return output.deltas[0].token_ids


def test_the_closing_tag_is_forced_at_the_limit(artifact: Path) -> None:
    engine = _engine(artifact)
    free = _ids(engine, SAMPLING)
    limited = _ids(engine, LIMITED)
    assert limited[:6] == free[:6]
    assert limited[6:9] == CLOSER
    assert not set(free) & {*CLOSER, 278}
    # Bans and penalties do not stand against it.
    banned = replace(LIMITED, bad_words=((276,),), presence_penalty=2.0, temperature=0.0)
    assert _ids(engine, banned)[6:9] == CLOSER
    # The answer ends its reasoning itself, in another spelling: nothing is forced.
    closes = replace(BUDGET, closers=(CLOSER, free[3:5]))
    assert _ids(engine, replace(SAMPLING, thinking=closes)) == free
    # It is about to: the rest of the tag is forced.
    begun = replace(BUDGET, closers=((*free[4:6], 276, 277),))
    assert _ids(engine, replace(SAMPLING, thinking=begun))[:8] == (*free[:6], 276, 277)
    # Reasoning that never began is none; one that the answer begins counts from there.
    absent = replace(BUDGET, openers=((275,), (276, 275)))
    assert _ids(engine, replace(SAMPLING, thinking=absent)) == free
    opened = replace(BUDGET, openers=(free[:1], free[:2], (275,)))
    assert _ids(engine, replace(SAMPLING, thinking=opened))[:11] == (*free[:8], *CLOSER)
    none = replace(BUDGET, max_tokens=0)
    assert _ids(engine, replace(SAMPLING, thinking=none))[:3] == CLOSER
    engine.close()


def test_neither_preemption_nor_forks_nor_resuming_changes_it(artifact: Path) -> None:
    engine = _engine(artifact)
    alone = [_ids(engine, replace(LIMITED, seed=11 + i)) for i in range(3)]
    assert all(ids[6:9] == CLOSER for ids in alone)
    (forked,) = run(engine, GenerateRequest("n", "tiny", PROMPT, LIMITED, n=3))
    assert [delta.token_ids for delta in forked.deltas] == alone
    for k in range(1, len(alone[0])):
        assert _ids(engine, LIMITED, output_token_ids=alone[0][:k]) == alone[0][k:]
    engine.close()
    cache = {"block_size": 4, "kv_memory": 18 * BLOCK_BYTES}
    small = _engine(artifact, cache=cache, scheduler={"max_num_seqs": 4})
    crowd = [
        GenerateRequest(f"c{i}", "tiny", PROMPT, replace(LIMITED, seed=11 + i)) for i in range(3)
    ]
    assert [output.deltas[0].token_ids for output in run(small, *crowd)] == alone
    assert small.stats().num_preemptions > 0
    small.close()


def test_a_grammar_goes_first(artifact: Path) -> None:
    """Within what it demands nothing is forced; where it allows the tag, the tag comes."""
    with LLM(artifact, max_model_len=64, runner={"threads": 1}) as llm:
        digits = GrammarSpec("regex", "[0-9]{3}")
        for tag, expected in (("x", "[0-9]{3}"), ("7", "[0-689]7[0-9]")):
            closer = tuple(llm.tokenizer.encode(tag, False))
            thinking = ThinkingBudget(1, ((),), (closer,))
            params = SamplingParams(max_tokens=20, seed=4, thinking=thinking)
            (answer,) = llm.generate(PROMPT_TEXT, params, grammar=digits)
            assert answer.finish_reason == "stop", answer
            assert re.fullmatch(expected, answer.text)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(BUDGET, max_tokens=-1),
        replace(BUDGET, closers=()),
        replace(BUDGET, closers=((),)),
        replace(BUDGET, openers=()),
        replace(BUDGET, closers=((9999,),)),
    ],
)
def test_a_budget_that_cannot_be_used_is_refused(wrong: ThinkingBudget) -> None:
    with pytest.raises(InvalidRequest) as refused:
        replace(SAMPLING, thinking=wrong).validate(320)
    assert refused.value.param == "thinking"
