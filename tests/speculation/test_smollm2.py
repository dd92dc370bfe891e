"""Speculation on the real SmolLM2-135M: many drafts are right, and no text is another one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.smollm2 import staged_smollm2
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig, SchedulerConfig, SpeculationConfig, StepCost
from torchweave_ray.engine.speculation import drafter
from torchweave_ray.engine.speculation.costs import Outcome
from torchweave_ray.outputs import GenerateRequest, Stats
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer
from torchweave_ray.tokenizer.grammar import GrammarSpec

pytestmark = pytest.mark.weights

LINES = "".join(f"def area_{n}(width, height):\n    return width * height\n\n" for n in "abc")
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=5, max_tokens=48, logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=48, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=0.0, max_tokens=48, stop=("height)",), min_tokens=3),
)
# Steps that seem to cost next to nothing beside their start: as many drafts as there may be.
CHEAP = SchedulerConfig(step_cost=StepCost(1e6, 1.0))


def check(draft: str | None) -> None:
    """No text changes, and many drafts are right."""
    artifact = staged_smollm2()
    tokenizer = load_tokenizer(artifact)
    method = "ngram" if draft is None else "draft"
    speculation = SpeculationConfig(method=method, model=draft)
    loaded = load_model(artifact, EngineConfig(speculation=speculation))
    prompt = tuple(tokenizer.encode(CHAT.format(f"Write this again.\n\n{LINES}")))
    numbers = GrammarSpec("regex", r"(12, 34, 56, )+").llguidance()
    requests = [
        *(GenerateRequest(str(i), "", prompt, each) for i, each in enumerate(SAMPLINGS)),
        GenerateRequest("n", "", prompt, replace(SAMPLINGS[1], logprobs=None), n=2),
        GenerateRequest("g", "", prompt, SAMPLINGS[0], grammar=numbers),
    ]

    def answers(speculation: SpeculationConfig) -> tuple[dict[object, object], Stats]:
        config = EngineConfig(scheduler=CHEAP, speculation=speculation)
        loaded.runner.reset()
        engine = build_engine(loaded, config, tokenizer)
        found: dict[object, object] = {}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                for d in output.deltas:
                    key = output.request_id, d.index
                    ids, text, scores = found.get(key, ((), "", ()))
                    scores += tuple((s.token_id, s.logprob) for s in d.logprobs or ())
                    found[key] = ids + d.token_ids, text + d.text, scores
        return found, engine.stats()

    plain, before = answers(SpeculationConfig(method="none"))
    drafted, after = answers(speculation)
    assert drafted == plain
    assert (before.num_draft_tokens, len(plain)) == (0, 7)
    assert after.num_accepted_tokens > 40
    assert after.num_accepted_tokens > 0.5 * after.num_draft_tokens or draft is None
    assert after.num_steps < before.num_steps


def test_no_text_changes() -> None:
    check(None)


@pytest.mark.slow
def test_no_text_changes_with_its_own_int4_as_draft_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever this machine makes of it: all that may be guessed is guessed.
    monkeypatch.setattr(drafter, "most_worth", lambda a, most, *_: Outcome(list(most), 1e9, most))
    monkeypatch.setattr(drafter, "least_acceptance", lambda *_: -1.0)
    check(str(staged_smollm2("smollm2-135m-int4")))
