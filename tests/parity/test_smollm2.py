"""The real SmolLM2-135M-Instruct against transformers in fp32: logits and greedy ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.paged import PagedDecoder, Text
from tests.smollm2 import staged_smollm2
from torchweave_ray.llm import LLM
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import fused_tensors
from torchweave_ray.models.weights import load_weights
from torchweave_ray.sampling_params import SamplingParams

pytestmark = pytest.mark.weights

QUESTIONS = [
    "What is gravity?",
    "Write a haiku about the sea.",
    "Name three primes above 100.",
    "Explain photosynthesis to a child.",
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def artifact() -> Path:
    return staged_smollm2()


@pytest.fixture(scope="module")
def reference(artifact: Path) -> Any:
    """transformers' own model over the artifact's weights, taken apart again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ModelConfig.read(artifact)
    weights = load_weights(artifact, config, torch.float32, torch.device("cpu"))
    state = {}
    for tensor in fused_tensors(config):
        sizes = [shape[0] for shape in tensor.source_shapes]
        parts = weights[tensor.name].split(sizes)
        state.update(zip(tensor.sources, parts, strict=True))
    model = LlamaForCausalLM(LlamaConfig(**json.loads((artifact / "config.json").read_text())))
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus
    assert missing in ([], ["lm_head.weight"]), "a tied head is the only thing left out"
    model.tie_weights()
    return model.float().eval()


@pytest.fixture(scope="module")
def llm(artifact: Path) -> Any:
    with LLM(artifact, runner={"dtype": "float32"}, max_model_len=512) as llm:
        yield llm


def _prompts(llm: LLM) -> list[list[int]]:
    chats = [llm.tokenizer.render_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    return [llm.tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def test_logits_of_chunked_prefill_equal_transformers(
    artifact: Path, reference: Any, llm: LLM
) -> None:
    prompt = _prompts(llm)[0]
    decoder = PagedDecoder(artifact)
    text = Text(prompt)
    first, rest = len(prompt) // 3, len(prompt) - len(prompt) // 3
    logits = torch.cat([decoder.step([(text, n)])[0] for n in (first, rest)])
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-4
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_greedy_ids_equal_transformers_alone_and_in_a_crowd(reference: Any, llm: LLM) -> None:
    prompts = _prompts(llm)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=[],
                pad_token_id=0,
            )
        expected.append(tuple(ids[0, len(prompt) :].tolist()))
    crowd = llm.generate(prompts * 4, params)
    assert [c.token_ids for c in crowd] == expected * 4
    assert llm.generate([prompts[0]], params)[0].token_ids == expected[0]


def test_a_chat_about_gravity_explains_gravity(llm: LLM) -> None:
    (answer,) = llm.chat(
        [{"role": "user", "content": "What is gravity?"}],
        SamplingParams(max_tokens=40, temperature=0.0),
    )
    assert "gravity" in answer.text.lower()
    assert any(word in answer.text.lower() for word in ("force", "mass", "attract"))
