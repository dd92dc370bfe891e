"""The sameness matrix: neither company, chunking, prefix cache nor preemption changes an answer.

Greedy ids are transformers' own; seeded ones are those of a run alone. fp32, a tiny random model.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.llm import LLM
from torchweave_ray.outputs import (
    GenerateRequest,
    OutputKind,
    Pooling,
    RequestOutput,
    merge_outputs,
)
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
SEEDED = SamplingParams(
    temperature=0.8,
    top_k=60,
    top_p=0.95,
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    max_tokens=NUM_TOKENS,
)
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 4
"""Of the tiny model, with block_size 4: keys and values, layers, KV heads, head_dim, fp32."""


def _prompts() -> list[list[int]]:
    draw = random.Random(3)
    shared = [draw.randrange(3, 300) for _ in range(18)]
    lengths = (1, 2, 7, 8, 9, 23, 31)
    fresh = [[draw.randrange(3, 300) for _ in range(n)] for n in lengths]
    return [*fresh, shared, *(shared + tail for tail in fresh[2:5]), shared[:16], fresh[5]]


PROMPTS = _prompts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sameness")
    make_checkpoint(root / "checkpoint")
    make_tiny_artifact(root / "artifact")
    return root


@pytest.fixture(scope="module")
def greedy(folder: Path) -> list[list[int]]:
    """transformers, one prompt after the other."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, use_cache=True
        )
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def seeded(folder: Path) -> list[list[int]]:
    with LLM(folder / "artifact", runner={"threads": 1}) as llm:
        return [_ids(llm, [p], [q])[0] for p, q in zip(PROMPTS, _seeded_params(), strict=True)]


def _seeded_params() -> list[SamplingParams]:
    return [replace(SEEDED, seed=2**40 + i) for i in range(len(PROMPTS))]


def _ids(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [list(c.token_ids) for c in llm.generate(prompts, params)]


def _options(chunk: int, prefix: bool, pool: str) -> dict[str, Any]:
    cache: dict[str, Any] = {"block_size": 4, "enable_prefix_caching": prefix}
    if pool == "tiny":  # one sequence of full length, and a little
        cache["kv_memory"] = 18 * BLOCK_BYTES
    scheduler = {"max_num_seqs": min(8, chunk), "max_num_batched_tokens": chunk}
    return {"max_model_len": 64, "cache": cache, "scheduler": scheduler, "runner": {"threads": 1}}


@pytest.mark.parametrize(
    ("chunk", "prefix", "pool"), [*itertools.product((8, 512), (True, False), ("tiny", "large"))]
)
def test_the_answers_are_the_same(
    folder: Path,
    greedy: list[list[int]],
    seeded: list[list[int]],
    chunk: int,
    prefix: bool,
    pool: str,
) -> None:
    with LLM(folder / "artifact", **_options(chunk, prefix, pool)) as llm:
        assert _ids(llm, PROMPTS, GREEDY) == greedy
        assert _ids(llm, PROMPTS, _seeded_params()) == seeded
        assert (llm.stats().num_preemptions > 0) == (pool == "tiny")
        assert (llm.stats().num_prefix_hit_tokens > 0) == prefix
        # Both kinds at once, in another order, and one alone.
        order = list(reversed(range(len(PROMPTS))))
        mixed = [_seeded_params()[i] if i % 2 else GREEDY for i in order]
        expected = [seeded[i] if i % 2 else greedy[i] for i in order]
        assert _ids(llm, [PROMPTS[i] for i in order], mixed) == expected
        assert _ids(llm, PROMPTS[5:6], GREEDY) == greedy[5:6]
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


def run(engine: Engine, *requests: GenerateRequest) -> list[RequestOutput]:
    outputs: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return [merge_outputs(parts) for parts in outputs.values()]


def _engine(folder: Path, **options: Any) -> Engine:
    config = EngineConfig.from_dict({**_options(512, True, "large"), **options})
    artifact = folder / "artifact"
    return build_engine(load_model(artifact, config), config, load_tokenizer(artifact))


def _request(name: str, index: int, sampling: SamplingParams, **kwargs: Any) -> GenerateRequest:
    return GenerateRequest(name, "tiny", tuple(PROMPTS[index]), sampling, **kwargs)


def test_choice_i_is_what_seed_plus_i_gives_alone(folder: Path) -> None:
    engine = _engine(folder)
    (forked,) = run(engine, _request("n", 5, replace(SEEDED, seed=40), n=4))
    alone = [run(engine, _request("a", 5, replace(SEEDED, seed=40 + i)))[0] for i in range(4)]
    assert [d.token_ids for d in forked.deltas] == [a.deltas[0].token_ids for a in alone]
    assert len({d.token_ids for d in forked.deltas}) == 4
    engine.close()


def test_a_resumed_and_an_exclusive_request_go_on_alike(
    folder: Path, seeded: list[list[int]]
) -> None:
    engine = _engine(folder)
    sampling = _seeded_params()[5]
    (whole,) = run(engine, _request("w", 5, sampling))
    assert list(whole.deltas[0].token_ids) == seeded[5]
    resumed = [
        _request(f"r{k}", 5, sampling, output_token_ids=tuple(seeded[5][:k])) for k in (1, 7, 23)
    ]
    crowd = run(engine, *resumed, _request("x", 5, sampling, exclusive=True))
    for k, output in zip((1, 7, 23, 0), crowd, strict=True):
        assert list(output.deltas[0].token_ids) == seeded[5][k:]
    engine.close()


@pytest.mark.parametrize("chunk", [5, 512])
def test_prompt_logprobs_and_pooling_equal_transformers(folder: Path, chunk: int) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
    prompt = torch.tensor([PROMPTS[6]])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(prompt).logits[0], dim=-1)
        hidden = model.model(prompt).last_hidden_state[0]
    engine = _engine(folder, scheduler={"max_num_seqs": 4, "max_num_batched_tokens": chunk})
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=3)
    scored, pooled, mean, _ = run(
        engine,
        _request("s", 6, sampling, output_kind=OutputKind.PROMPT_LOGPROBS),
        _request("p", 6, sampling, output_kind=OutputKind.POOLED),
        _request("m", 6, sampling, output_kind=OutputKind.POOLED, pooling=Pooling.MEAN),
        _request("g", 3, GREEDY),
    )
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == len(PROMPTS[6])
    for position, entry in enumerate(scored.prompt_logprobs[1:], start=1):
        assert entry is not None
        expected = logprobs[position - 1, PROMPTS[6][position]].item()
        assert entry.logprob == pytest.approx(expected, abs=1e-3)
        assert entry.top[0][0] == int(logprobs[position - 1].argmax())
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(torch.tensor(pooled.pooled), hidden[-1], **close)
    torch.testing.assert_close(torch.tensor(mean.pooled), hidden.mean(dim=0), **close)
    engine.close()
