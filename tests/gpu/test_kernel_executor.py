"""A whole decoder on our Triton kernels beside the torch reference, over mixed steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import FAMILIES
from tests.parity.paged import PagedDecoder, Text
from tests.tiny import make_tiny_artifact
from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams

pytest.importorskip("triton", reason="triton, the language of the kernels, is not installed")
from torchweave_ray.attention.triton_paged import TritonPagedAttention
from torchweave_ray.kernels.triton.ops import TritonOps

STEPS = [((0, 9),), ((0, 1), (1, 12)), ((0, 1), (1, 1), (2, 5))]
"""(sequence, tokens) of each step."""


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("qwen3", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(tmp_path: Path, device: torch.device, family: str) -> None:
    artifact = make_tiny_artifact(tmp_path, **FAMILIES.get(family, {"num_hidden_layers": 1}))
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(300, (24,), generator=random) for _ in range(3)]
    ours = PagedDecoder(artifact, device=device, attention=TritonPagedAttention(), ops=TritonOps())
    theirs = PagedDecoder(artifact)
    sequences = [[Text(text.tolist()) for text in texts] for _ in range(2)]
    for step in STEPS:
        got, expected = (
            decoder.step([(mine[i], n) for i, n in step])
            for decoder, mine in zip((ours, theirs), sequences, strict=True)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_crowd_changes_no_bit_of_the_logits(tmp_path: Path, device: torch.device) -> None:
    artifact = make_tiny_artifact(tmp_path, num_hidden_layers=1)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(300, (n,), generator=random).tolist() for n in (9, 30, 5)]

    def logits(of: list[int]) -> list[torch.Tensor]:
        """Of a prompt each, then of one more token."""
        ops = TritonOps(batch_invariant=True)
        decoder = PagedDecoder(artifact, device=device, attention=TritonPagedAttention(), ops=ops)
        texts = [Text([*prompts[i], 7]) for i in of]
        decoder.step([(text, len(text.token_ids) - 1) for text in texts])
        return decoder.step([(text, 1) for text in texts])

    together = logits([0, 1, 2])
    for i in range(3):
        assert torch.equal(logits([i])[0], together[i])


PROMPTS = [[3, 9, 27, 81] * 3, [5, 7]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0.8, seed=1, top_p=0.9, max_tokens=3, ignore_eos=True),
]


@pytest.mark.slow
def test_texts_are_those_of_the_torch_executor(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    artifact = make_tiny_artifact(tmp_path, **heads)  # type: ignore[arg-type]
    answers = []
    for runner in ({"executor": "torch"}, {"executor": "triton", "step_depth": 1}):
        with LLM(artifact, runner=runner) as llm:
            assert llm.info.executor == runner["executor"]
            answers.append(llm.generate(PROMPTS, PARAMS))
    plain, ours = answers
    assert [a.token_ids for a in ours] == [a.token_ids for a in plain]
    assert ours[0].logprobs is not None
    assert ours[0].logprobs[0].logprob == pytest.approx(plain[0].logprobs[0].logprob, abs=1e-4)  # type: ignore[index]


@pytest.mark.slow
def test_slices_of_a_model_run_on_them(tmp_path: Path) -> None:
    """Two ranks, each a process with half of the heads."""
    artifact = make_tiny_artifact(tmp_path, num_hidden_layers=1)
    answers = []
    for executor, num_ranks in (("torch", 1), ("triton", 2)):
        options = {"runner": {"executor": executor}, "tensor_parallel_size": num_ranks}
        with LLM(artifact, **options) as llm:
            answers.append([each.token_ids for each in llm.generate(PROMPTS, PARAMS)])
    assert llm.info.executor == "triton tp2"
    assert answers[0] == answers[1]
