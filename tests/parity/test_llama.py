"""Our decoder against transformers', fp32, on tiny random checkpoints: chunked, mixed, shuffled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.paged import PagedDecoder, Text, assert_close, make_inputs
from tests.tiny import make_checkpoint, make_tiny_artifact

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "rope_parameters": {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 2000.0}},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "wide_heads": {"head_dim": 24},
    "narrow_heads": {
        "head_dim": 6,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "bias": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 3},
}


def _reference(checkpoint: Path) -> Any:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


@pytest.fixture(params=VARIANTS, scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    overrides = VARIANTS[request.param]
    artifact = make_tiny_artifact(folder / "artifact", **overrides)
    return _reference(make_checkpoint(folder / "checkpoint", **overrides)), artifact


def _random_texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 300) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def _expected(model: Any, texts: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([text])).logits[0] for text in texts]


def _run_in_chunks(decoder: PagedDecoder, texts: list[list[int]], seed: int) -> list[Tensor]:
    """Every step takes some sequences, with one token or a chunk each, until all are through."""
    draw = random.Random(seed)
    sequences = [Text(text) for text in texts]
    pieces: list[list[Tensor]] = [[] for _ in texts]
    while left := [i for i, s in enumerate(sequences) if s.num_computed < len(s.token_ids)]:
        taken = draw.sample(left, draw.randint(1, len(left)))
        chunks = []
        for i in taken:
            remaining = len(texts[i]) - sequences[i].num_computed
            chunks.append((sequences[i], min(remaining, draw.choice([1, 1, 1, 3, 3, 8, 17]))))
        for i, logits in zip(taken, decoder.step(chunks), strict=True):
            pieces[i].append(logits)
    return [torch.cat(p) for p in pieces]


def test_whole_prompts_equal_transformers(both: Any) -> None:
    model, artifact = both
    texts = _random_texts([37, 1, 64, 37])
    decoder = PagedDecoder(artifact)
    got = decoder.step([(Text(text), len(text)) for text in texts])
    for logits, expected in zip(got, _expected(model, texts), strict=True):
        assert_close(logits, expected)


def test_random_chunks_and_decodes_equal_transformers(both: Any) -> None:
    model, artifact = both
    texts = _random_texts([5, 90, 41, 16, 63], seed=1)
    expected = _expected(model, texts)
    for seed, block_size in ((0, 8), (1, 1), (2, 16)):
        decoder = PagedDecoder(artifact, 240 // block_size + 8, block_size, seed=seed)
        for logits, wanted in zip(_run_in_chunks(decoder, texts, seed), expected, strict=True):
            assert_close(logits, wanted)


def test_greedy_ids_equal_transformers_alone_and_in_a_crowd(both: Any) -> None:
    model, artifact = both
    texts = _random_texts([12, 3, 30], seed=2)
    wanted = []
    for text in texts:
        ids = model.generate(
            torch.tensor([text]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=2,
        )
        wanted.append(ids[0].tolist())
    assert [_greedy(PagedDecoder(artifact), [text], 24)[0] for text in texts] == wanted
    assert _greedy(PagedDecoder(artifact), texts, 24) == wanted


def _greedy(decoder: PagedDecoder, texts: list[list[int]], num_new: int) -> list[list[int]]:
    sequences = [Text(list(text)) for text in texts]
    for _ in range(num_new):
        chunks = [(s, len(s.token_ids) - s.num_computed) for s in sequences]
        for sequence, logits in zip(sequences, decoder.step(chunks), strict=True):
            sequence.token_ids.append(int(logits[-1].argmax()))
    return [s.token_ids for s in sequences]


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path)
    texts = _random_texts([40, 7])
    exact = _run_in_chunks(PagedDecoder(artifact), texts, seed=0)
    rounded = _run_in_chunks(PagedDecoder(artifact, dtype=torch.bfloat16), texts, seed=0)
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.float32
        similarity = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
        assert similarity.min() > 0.99


def test_logits_come_for_the_asked_rows_only(tmp_path: Path) -> None:
    decoder = PagedDecoder(make_tiny_artifact(tmp_path))
    texts = [Text(t, block_table=[3 + i]) for i, t in enumerate(_random_texts([6, 4]))]
    chunks = [(text, len(text.token_ids)) for text in texts]
    every = decoder.executor.forward(make_inputs(chunks, 8), decoder.kv)
    last = decoder.executor.forward(make_inputs(chunks, 8, all_rows=False), decoder.kv)
    assert last.shape == (2, 300)
    assert torch.allclose(last, every[[5, 9]], rtol=1e-5, atol=1e-5)
