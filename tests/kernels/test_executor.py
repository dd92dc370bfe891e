"""The native executor against the torch executor in fp32, and its own bits against each other."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.kernels.native import (
    FORMATS,
    Formats,
    NativeDecoder,
    assert_near_torch,
    assert_same_bits_in_any_batch,
    quantized_weights,
)
from tests.parity.paged import PagedDecoder, Text, random_texts
from tests.tiny import VARIANTS, make_tiny_artifact
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.errors import ConfigError
from torchweave_ray.kernels.library import ISA_VARIABLE, Library
from torchweave_ray.kernels.packing import PackedLinear, unpack_linear
from torchweave_ray.llm import LLM
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.emitter import CannotLower
from torchweave_ray.models.lowering import lower
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights
from torchweave_ray.sampling_params import SamplingParams


@pytest.fixture(params=list(VARIANTS))
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tiny_artifact(tmp_path, dtype=torch.bfloat16, **VARIANTS[request.param])


def test_logits_are_those_of_the_torch_executor(artifact: Path, library: Library) -> None:
    assert_near_torch(artifact, library)


def test_hidden_states_are_those_of_the_torch_executor(artifact: Path, library: Library) -> None:
    from tests.parity.paged import make_inputs

    text = Text(random_texts(20)[0], list(range(3)))
    inputs = make_inputs([(text, 20)], 8)
    exact, native = PagedDecoder(artifact), NativeDecoder(artifact, library)
    expected = exact.executor.hidden(inputs, exact.kv)
    actual = native.executor.hidden(inputs, native.kv)
    assert actual.dtype == torch.float32
    assert (actual - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("name", list(FORMATS))
def test_quantized_logits_are_those_of_the_weights_they_stand_for(
    tmp_path: Path, library: Library, name: str
) -> None:
    artifact = make_tiny_artifact(tmp_path, dtype=torch.bfloat16, **VARIANTS["biased"])
    formats = FORMATS[name]
    texts = random_texts(1, 30, 70)
    exact = PagedDecoder(artifact)
    config = ModelConfig.read(artifact)
    weights = load_weights(artifact, config, torch.float32, torch.device("cpu"))
    meant = {
        tensor: unpack_linear(w) if isinstance(w, PackedLinear) else w
        for tensor, w in quantized_weights(config, weights, formats).items()
    }
    exact.executor = TorchExecutor(exact.spec, meant, TorchPagedAttention())
    native = NativeDecoder(artifact, library, formats=formats)
    outputs = [d.step([(Text(ids), len(ids)) for ids in texts]) for d in (exact, native)]
    expected, actual = (torch.cat(logits) for logits in outputs)
    assert (actual - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("name", list(FORMATS))
def test_quantized_rows_have_the_same_bits_in_any_batch(
    tmp_path: Path, library: Library, name: str
) -> None:
    artifact = make_tiny_artifact(tmp_path, dtype=torch.bfloat16, **VARIANTS["tied"])
    assert_same_bits_in_any_batch(artifact, library, FORMATS[name])


def test_a_rows_logits_have_the_same_bits_in_any_batch(artifact: Path, library: Library) -> None:
    assert_same_bits_in_any_batch(artifact, library, {})


@pytest.mark.parametrize("num_rows", [1, 2, 5, 12, 13, 24, 32])
@pytest.mark.parametrize("formats", [{}, FORMATS["int8"], FORMATS["int4"]])
def test_decodes_have_the_same_bits_in_every_batch_size(
    tmp_path: Path, library: Library, num_rows: int, formats: Formats
) -> None:
    artifact = make_tiny_artifact(tmp_path, dtype=torch.bfloat16)
    decoders = [NativeDecoder(artifact, library, n, formats=formats) for n in (1, 2)]
    texts = random_texts(*range(5, 5 + num_rows))
    for decoder in decoders:
        together = [Text(ids) for ids in texts]
        decoder.step([(t, len(t.token_ids) - 1) for t in together])
        rows = decoder.step([(t, 1) for t in together])
        alone = Text(texts[-1])
        decoder.step([(alone, len(alone.token_ids) - 1)])
        assert torch.equal(decoder.step([(alone, 1)])[0], rows[-1])


def test_rows_that_need_no_logits_change_nothing(tmp_path: Path, library: Library) -> None:
    from tests.parity.paged import make_inputs

    decoder = NativeDecoder(make_tiny_artifact(tmp_path, dtype=torch.bfloat16), library)
    texts = [Text(ids, [2 * i, 2 * i + 1]) for i, ids in enumerate(random_texts(9, 4))]
    chunks = [(text, len(text.token_ids)) for text in texts]
    every = decoder.executor.forward(make_inputs(chunks, 16), decoder.kv).clone()
    last = decoder.executor.forward(make_inputs(chunks, 16, all_rows=False), decoder.kv)
    assert torch.equal(last, every[[8, 12]])


def test_greedy_answers_are_those_of_torch(tmp_path: Path, library: Library) -> None:
    """With prefix hits, preemption and small chunks; the torch executor computes in fp32."""
    make_tiny_artifact(tmp_path, dtype=torch.bfloat16)
    prompts, greedy = random_texts(8, 23, 31, 40), SamplingParams(temperature=0.0, max_tokens=6)
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 8}
    answers = []
    for options in (
        {"runner": {"dtype": "float32"}},
        {"runner": {"executor": "native", "threads": 2}},
        {"runner": {"executor": "native", "threads": 1}, "scheduler": small},
    ):
        with LLM(tmp_path, max_model_len=64, **options) as llm:
            done = llm.generate(prompts, greedy)
            answers.append([c.token_ids for c in done])
            info = llm.info
    assert info.executor == f"native {library.isa}"
    assert answers[1] == answers[0]
    assert answers[2] == answers[1]


def test_what_cannot_be_lowered_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_tiny_artifact(tmp_path, dtype=torch.bfloat16, hidden_size=48)  # head_dim 12
    with pytest.raises(ConfigError, match="'native', but head_dim 12"):
        LLM(artifact, max_model_len=64, runner={"executor": "native"})
    with caplog.at_level(logging.WARNING), LLM(artifact, max_model_len=64) as llm:
        assert llm.info.executor == "torch"
    assert "the torch executor runs this model" in caplog.text
    config = ModelConfig.read(artifact)
    weights = load_weights(artifact, config, torch.float32, torch.device("cpu"))
    fits = make_tiny_artifact(tmp_path / "fits", dtype=torch.bfloat16)
    with pytest.raises(CannotLower, match="float32"):
        lower(build_spec(config), weights)
    with pytest.raises(ConfigError, match=r"'native', but cache\.block_size 24 is no mult"):
        LLM(fits, max_model_len=64, cache={"block_size": 24}, runner={"executor": "native"})
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(ConfigError, match="must be none or one of"):
        LLM(artifact, max_model_len=64)
    monkeypatch.setenv(ISA_VARIABLE, "none")
    with pytest.raises(ConfigError, match="is 'none'"):
        LLM(artifact, max_model_len=64, runner={"executor": "native"})
