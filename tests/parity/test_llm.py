"""`LLM` and what `build` wires: answers, refusals, recovery, start-up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import EOS_TOKEN_ID, make_checkpoint, make_tiny_artifact
from torchweave_ray.build import load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ArtifactError, ConfigError, InvalidRequest
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import WEIGHTS
from torchweave_ray.outputs import FinishReason
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer
from torchweave_ray.tokenizer.grammar import GrammarSpec, choice_spec, json_spec

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
ONE_THREAD: dict[str, Any] = {"threads": 1}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("llm") / "tiny-model")


@pytest.fixture(scope="module")
def llm(artifact: Path) -> LLM:
    return LLM(artifact, max_model_len=128, runner=ONE_THREAD)


def test_texts_and_token_ids_give_the_same_completions(llm: LLM) -> None:
    texts = ["What is a star?", "Gravity is", "größe 😀"]
    seen: list[tuple[int, int]] = []
    completions = llm.generate(texts, GREEDY, progress=lambda done, all_: seen.append((done, all_)))
    again = llm.generate([llm.tokenizer.encode(text) for text in texts], GREEDY)
    assert [(c.token_ids, c.text) for c in again] == [(c.token_ids, c.text) for c in completions]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for text, completion in zip(texts, completions, strict=True):
        assert completion.prompt_token_ids == tuple(llm.tokenizer.encode(text))
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    (alone,) = llm.generate(texts[1], GREEDY)
    assert alone.token_ids == completions[1].token_ids


def test_params_may_differ_by_prompt(llm: LLM) -> None:
    (whole,) = llm.generate("A star is", SamplingParams(temperature=0.0, max_tokens=20))
    stop = whole.text[6:9]
    params = [
        SamplingParams(temperature=0.0, max_tokens=3, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=20, stop=(stop,)),
        SamplingParams(temperature=0.0, max_tokens=5, logit_bias={EOS_TOKEN_ID: 100.0}),
        SamplingParams(
            temperature=0.0, max_tokens=9, min_tokens=4, logit_bias={EOS_TOKEN_ID: 100.0}
        ),
    ]
    short, stopped, ended, late = llm.generate(["A star is"] * 4, params)
    assert short.token_ids == whole.token_ids[:3]
    assert short.logprobs is not None
    assert [entry.token_id for entry in short.logprobs] == list(short.token_ids)
    assert all(entry.rank == 1 and len(entry.top) == 2 for entry in short.logprobs)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert (ended.token_ids, ended.text) == ((EOS_TOKEN_ID,), "")
    assert len(late.token_ids) == 5
    assert late.token_ids[-1] == EOS_TOKEN_ID
    assert whole.logprobs is None


def test_the_prefix_cache_shows_in_the_completion(llm: LLM) -> None:
    prompt = list(range(3, 60))
    llm.generate([prompt], GREEDY)
    assert llm.generate([prompt], GREEDY)[0].num_cached_tokens == 48


def test_chat_renders_the_template(llm: LLM) -> None:
    pytest.importorskip("transformers")
    messages = [{"role": "user", "content": "What is gravity?"}]
    (answer,) = llm.chat(messages, GREEDY)
    rendered = "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
    assert answer.prompt_token_ids == tuple(llm.tokenizer.encode(rendered))
    assert [c.token_ids for c in llm.chat([messages, messages], GREEDY)] == [answer.token_ids] * 2


@pytest.mark.parametrize(
    ("prompts", "params", "param"),
    [
        (["fine", 7], None, "prompts"),
        ([3, 4, 5], None, "prompts"),
        ([b"bytes"], None, "prompts"),
        ([[3, 4], []], None, "prompt"),
        ([[3, 300]], None, "prompt_token_ids"),
        (["fine", "x" * 300], GREEDY, "prompt"),
        (["fine"], [GREEDY, GREEDY], "params"),
        (["fine"], SamplingParams(temperature=-1.0), "temperature"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(
    llm: LLM, prompts: Any, params: Any, param: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        llm.generate(prompts, params)
    assert error.value.param == param
    assert llm.stats().num_waiting == 0
    assert llm.generate([]) == []


def test_it_can_go_on_after_an_interruption(llm: LLM) -> None:
    expected = llm.generate(["A star is", "Gravity"], GREEDY)

    def interrupt(_done: int, _all: int) -> None:
        raise KeyboardInterrupt

    params = [GREEDY, SamplingParams(max_tokens=60, repetition_penalty=1.2)]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["A star is", "Gravity"], params, progress=interrupt)
    again = llm.generate(["A star is", "Gravity"], GREEDY)
    assert [c.token_ids for c in again] == [c.token_ids for c in expected]
    assert llm.stats().num_free_blocks == llm.stats().num_blocks


def test_a_model_is_an_artifact_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="torchweave optimize"):
        LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        LLM(tmp_path)


def test_options_are_the_configs_keys(artifact: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(artifact, max_model_length=64)
    with pytest.raises(ConfigError, match=r"scheduler\.max_num_seqs"):
        LLM(artifact, scheduler={"max_num_seqs": "8"})
    with pytest.raises(ConfigError, match=r"kv_dtype.*'auto' or 'model' or 'int8', got 'int4'"):
        LLM(artifact, runner={"kv_dtype": "int4"})
    with pytest.raises(ConfigError, match="kv_dtype"):
        LLM(artifact, runner={"kv_type": "int8"})
    with pytest.raises(ConfigError, match="kv_memory"):
        LLM(artifact, cache={"kv_memory": 1000}, runner=ONE_THREAD)
    with pytest.raises(ConfigError, match="512 positions"):
        LLM(artifact, max_model_len=513, runner=ONE_THREAD)


def test_a_tampered_artifact_is_refused_by_name(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tampered")
    raw = bytearray((artifact / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (artifact / WEIGHTS).write_bytes(raw)
    with pytest.raises(ArtifactError, match=WEIGHTS):
        LLM(artifact)


def test_what_was_loaded_is_told(artifact: Path, llm: LLM) -> None:
    info = llm.info
    assert (info.id, info.architecture) == ("tiny-model", "LlamaForCausalLM")
    assert (info.vocab_size, info.eos_token_ids) == (300, (EOS_TOKEN_ID,))
    assert (info.device, info.dtype, info.executor) == ("cpu", "float32", "torch")
    assert (info.max_model_len, info.max_num_seqs, info.block_size) == (128, 32, 16)
    assert list(llm.startup_s) == ["verify", "weights", "kv_cache", "first_step"]
    config = EngineConfig.from_dict({"runner": {"dtype": "bfloat16", **ONE_THREAD}})
    other = load_model(artifact, config, "another").info
    assert (other.id, other.dtype, other.max_model_len) == ("another", "bfloat16", 512)
    assert other.artifact_id == info.artifact_id
    assert other.numerics_id != info.numerics_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_cache_holds_more_and_is_told(artifact: Path, dtype: str) -> None:
    """And answers the same alone and in company: what one sequence writes is its own."""
    scores, infos, blocks = [], [], []
    prompts = ["What is a star?", "Gravity is", "A planet"]
    seeded = SamplingParams(max_tokens=12, temperature=0.8, seed=7)
    greedy = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)
    for kv_dtype in ("auto", "int8"):
        runner = {**ONE_THREAD, "dtype": dtype, "kv_dtype": kv_dtype}
        with LLM(artifact, cache={"kv_memory": 100_000}, runner=runner) as llm:
            infos.append(llm.info)
            blocks.append(llm.stats().num_blocks)
            together = llm.generate(prompts, seeded)
            assert llm.generate(prompts[1], seeded)[0].token_ids == together[1].token_ids
            entries = [c.logprobs[0] for c in llm.generate(prompts, greedy) if c.logprobs]
            scores.append([entry.logprob for entry in entries])
    assert [info.kv_dtype for info in infos] == [dtype, "int8"]
    assert infos[0].numerics_id != infos[1].numerics_id
    assert blocks[1] > 1.5 * blocks[0]
    assert scores[0] != scores[1]
    # bfloat16 itself is up to 0.04 away from float32 here
    assert scores[1] == pytest.approx(scores[0], abs=0.02 if dtype == "float32" else 0.06)
    assert len(scores[0]) == 3


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "eos", eos_token_id=[2, 300])
    with pytest.raises(ArtifactError, match="eos_token_id 300"):
        LLM(artifact)


def test_bfloat16_answers_in_text(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "bf16", dtype=torch.bfloat16)
    with LLM(artifact, runner=ONE_THREAD) as llm:
        assert llm.info.dtype == "bfloat16"
        first = llm.generate(["What is a star?"] * 3, GREEDY)
        assert len({c.token_ids for c in first}) == 1
    assert load_tokenizer(artifact).decode(first[0].token_ids) == first[0].text


def test_importing_it_needs_torch_but_neither_ray_nor_transformers() -> None:
    absent = ["ray", "transformers", "pydantic", "starlette", "typer", "httpx"]
    code = f"import torchweave_ray.llm, sys; print(*[m for m in {absent} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


def test_allowed_tokens_and_bad_words(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("A star is")
    free = llm.generate([prompt], SamplingParams(temperature=1.0, max_tokens=40, seed=1))[0]
    allowed = tuple(sorted({*free.token_ids[:3], 77, 99}))
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=1, allowed_token_ids=allowed)
    (kept,) = llm.generate([prompt], params)
    assert set(kept.token_ids) <= set(allowed)
    assert len(kept.token_ids) == 40
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    (whole,) = llm.generate([prompt], greedy)
    words = (whole.token_ids[4:7], (whole.token_ids[9],))
    (changed,) = llm.generate([prompt], replace(greedy, bad_words=words))
    assert changed.token_ids[:6] == whole.token_ids[:6]
    assert changed.token_ids[6] != whole.token_ids[6]
    runs = [changed.token_ids[i : i + 3] for i in range(18)]
    assert words[0] not in runs
    assert whole.token_ids[9] not in changed.token_ids


def test_logprobs_of_prompt_and_answer_equal_transformers(
    artifact: Path, tmp_path: Path, llm: LLM
) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, prompt_logprobs=2)
    (scored,) = llm.generate("What is a star?", params)
    ids = [*scored.prompt_token_ids, *scored.token_ids]
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    assert scored.prompt_logprobs is not None
    assert scored.logprobs is not None
    entries = [*scored.prompt_logprobs[1:], *scored.logprobs]
    num_top = [2] * (len(scored.prompt_token_ids) - 1) + [3] * len(scored.token_ids)
    assert len(entries) == len(ids) - 1
    for position, entry in enumerate(entries):
        assert entry is not None
        row = expected[position]
        assert entry.logprob == pytest.approx(row[ids[position + 1]].item(), abs=1e-3)
        values = row.topk(num_top[position]).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-3)


def test_texts_follow_their_grammars(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60)
    digits = GrammarSpec("regex", "[0-9]{3}")
    schema = json_spec({"type": "array", "items": {"type": "boolean"}, "maxItems": 2})
    prompts = ["A star is"] * 3
    number, free, array = llm.generate(prompts, params, grammar=[digits, None, schema])
    assert re.fullmatch("[0-9]{3}", number.text)
    assert number.finish_reason == FinishReason.STOP
    assert all(type(item) is bool for item in json.loads(array.text))
    assert free.text == llm.generate(prompts[:1], params)[0].text
    both = llm.generate(prompts[:2], params, grammar=choice_spec(["yes", "no"]))
    assert {c.text for c in both} <= {"yes", "no"}
    for wrong in (GrammarSpec("regex", "("), [digits, digits]):
        with pytest.raises(InvalidRequest) as refused:
            llm.generate(prompts, params, grammar=wrong)
        assert refused.value.param == "grammar"
