"""Random requests with every feature mixed, on real models: speculation changes no text.

How many guesses are made is left to chance here, so that nothing depends on the clock.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.lora.adapters import make_adapter
from tests.tiny import make_tiny_artifact
from torchweave_ray.build import LoadedModel, build_engine, load_model
from torchweave_ray.config import (
    CacheConfig,
    EngineConfig,
    LoraConfig,
    RunnerConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.speculation import drafter
from torchweave_ray.engine.speculation.costs import Outcome
from torchweave_ray.errors import ConfigError
from torchweave_ray.outputs import GenerateRequest, Stats
from torchweave_ray.sampling_params import SamplingParams, ThinkingBudget
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer
from torchweave_ray.tokenizer.grammar import GrammarSpec

VOCAB = 300
LONGEST = 90
ADAPTERS = ("red", "green", "blue")
GRAMMARS = (
    GrammarSpec("regex", r"(ab|cd, )+[0-9]{2,9}"),
    GrammarSpec("regex", r"[a-f]{3,20}\."),
    GrammarSpec("json_schema", '{"type": "object"}'),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model beside its adapters, and the same in another dtype: it guesses well, not always."""
    root = tmp_path_factory.mktemp("speculation")
    served = make_tiny_artifact(root / "served", dtype=torch.bfloat16)
    for seed, name in enumerate(ADAPTERS):
        make_adapter(root / "adapters" / name, served, seed=seed)
    return served, make_tiny_artifact(root / "small", dtype=torch.float32)


def config_of(method: str, small: Path) -> EngineConfig:
    model = str(small) if method == "draft" else None
    return EngineConfig(
        max_model_len=LONGEST,
        cache=CacheConfig(kv_memory=36 * 12_288, watermark=0.0),  # 36 blocks: not all fit at once
        scheduler=SchedulerConfig(max_num_seqs=20, max_num_batched_tokens=60),
        runner=RunnerConfig(threads=1),
        speculation=SpeculationConfig(method=method, model=model, max_draft_tokens=5),
        lora=LoraConfig(source=str(small.parent / "adapters"), max_loaded=2, max_rank=4),
    )


def random_request(rng: random.Random, number: int, tokenizer: Tokenizer) -> GenerateRequest:
    prefix = [5 + i % 200 for i in range(rng.choice([0, 16, 33]))]
    prompt = [*prefix, *(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 20)))]
    words = tuple(tuple(tokenizer.encode(w)) for w in ("th", "a st", "gr"))
    thinking = ThinkingBudget(rng.randint(1, 6), ((),), ((61, 62), (63,)))
    sampling = SamplingParams(
        max_tokens=rng.randint(1, LONGEST - len(prompt)) if rng.random() < 0.8 else None,
        temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.0, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        logit_bias={rng.randrange(VOCAB): 3.0} if rng.random() < 0.2 else {},
        allowed_token_ids=(40, 41, 90) if rng.random() < 0.15 else None,
        bad_words=words if rng.random() < 0.2 else (),
        seed=number,
        min_tokens=rng.choice([0, 0, 1, 4]),
        ignore_eos=rng.random() < 0.5,
        stop=("e", "or") if rng.random() < 0.2 else (),
        stop_token_ids=(70, 71) if rng.random() < 0.2 else (),
        logprobs=rng.choice([None, None, 0, 3]),
        thinking=thinking if rng.random() < 0.1 else None,
    )
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        sampling = replace(sampling, min_tokens=0)
    adapter = rng.choice(ADAPTERS) if rng.random() < 0.3 else ""
    request = GenerateRequest(f"r{number}", "", tuple(prompt), sampling, adapter=adapter)
    if rng.random() < 0.2:
        plain = replace(sampling, allowed_token_ids=None, thinking=None)
        grammar = rng.choice(GRAMMARS).llguidance()
        return replace(request, sampling=plain, grammar=grammar)
    kind = rng.random()
    if kind < 0.15:
        return replace(request, n=rng.randint(2, 4))
    return replace(request, exclusive=kind < 0.2, priority=rng.choice([0, 0, 1]))


def guess_at_random(monkeypatch: pytest.MonkeyPatch, seed: int, share: float) -> None:
    """In place of the decision by costs."""
    rng = random.Random(seed)

    def most_worth(acceptances, most, num_draws, costs) -> Outcome:
        nums = [rng.randint(0, m) if m and rng.random() < share else 0 for m in most]
        return Outcome(nums, 1e9, [1.0] * len(most))

    monkeypatch.setattr(drafter, "most_worth", most_worth)
    monkeypatch.setattr(drafter, "least_acceptance", lambda *_: -1.0)


def answers(engine: Engine, requests: list[GenerateRequest]) -> dict[object, tuple]:
    """By request and choice: tokens, text, why it ended, and logprobs."""
    found: dict[object, tuple] = {}
    rng = random.Random(1)
    waiting = list(reversed(requests))
    while waiting or engine.has_work:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                engine.add(waiting.pop())
        for output in engine.step():
            for d in output.deltas:
                key = output.request_id, d.index
                ids, text, scores, _ = found.get(key, ((), "", (), None))
                scores += tuple((s.token_id, s.logprob) for s in d.logprobs or ())
                end = d.finish_reason, d.stop_reason, d.error
                found[key] = ids + d.token_ids, text + d.text, scores, end
    engine.check_integrity()
    return found


def run(
    loaded: LoadedModel, config: EngineConfig, requests: list[GenerateRequest]
) -> tuple[dict[object, tuple], Stats]:
    loaded.runner.reset()
    engine = build_engine(loaded, config, load_tokenizer(loaded.tokenizer_dir))
    found = answers(engine, requests)
    return found, engine.stats()


def resumed(requests: list[GenerateRequest], whole: dict[object, tuple]) -> list[GenerateRequest]:
    """A third of them, as after a break: some tokens are known, their text was not sent yet."""
    rng = random.Random(8)
    return [
        replace(r, output_token_ids=whole[r.request_id, 0][0][: rng.randint(1, 20)])
        for r in requests[::3]
        if r.n == 1 and len(whole[r.request_id, 0][0]) > 20
    ]


@pytest.mark.parametrize(
    "num_requests", [100, pytest.param(500, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_no_text_changes(
    num_requests: int, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, small = folders
    share = num_requests / 500
    loaded, tokenizer = load_model(served, config_of("draft", small)), load_tokenizer(served)
    rng = random.Random(77)
    requests = [random_request(rng, i, tokenizer) for i in range(num_requests)]
    plain, before = run(loaded, config_of("none", small), requests)
    again = resumed(requests, plain)
    plain_again, _ = run(loaded, config_of("none", small), again)
    assert before.num_preemptions > 50 * share
    assert len(again) > 50 * share
    guess_at_random(monkeypatch, 3, 0.7)
    for method, most in (("ngram", 100), ("draft", 1000)):
        drafted, after = run(loaded, config_of(method, small), requests)
        assert drafted == plain
        assert run(loaded, config_of(method, small), again)[0] == plain_again
        assert after.num_preemptions > 50 * share
        assert after.num_prefix_hit_tokens > 100 * share
        assert after.num_accepted_tokens > most * share
        assert after.num_draft_tokens - after.num_accepted_tokens > 100 * share


def test_a_model_of_another_tokenizer_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    served, _ = folders
    other = make_tiny_artifact(tmp_path / "other", tokens=280)
    with pytest.raises(ConfigError, match="other has another tokenizer than served: 280 tokens"):
        load_model(served, config_of("draft", other))
    with pytest.raises(ConfigError, match=r"nowhere is not an artifact's folder; stage"):
        load_model(served, config_of("draft", tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "draft"}, "speculation.model must name the model"),
        ({"model": "x"}, "speculation.method 'ngram' takes no model"),
        ({"method": "none", "model": "x"}, "speculation.method 'none' takes no model"),
        ({"method": "drafts"}, "must be 'none' or 'ngram' or 'draft'"),
    ],
)
def test_a_model_and_its_method_go_together(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_dict({"speculation": {"method": "ngram", **values}})
