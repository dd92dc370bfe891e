"""Each family on tiny random checkpoints with every flag on, beside transformers in fp32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES
from tests.parity.paged import PagedDecoder, Text, assert_close, random_texts
from tests.tiny import make_checkpoint, make_tiny_artifact


def reference(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_and_greedy_ids_equal_transformers(tmp_path: Path, name: str) -> None:
    """Texts of several windows, whole and in chunks with decodes of others between."""
    model = reference(make_checkpoint(tmp_path / "checkpoint", **FAMILIES[name]))
    artifact = make_tiny_artifact(tmp_path / "artifact", **FAMILIES[name])
    texts = random_texts(70, 90, 41)
    expected = [model(torch.tensor([text])).logits[0] for text in texts]
    decoder = PagedDecoder(artifact)
    for logits, wanted in zip(
        decoder.step([(Text(text), len(text)) for text in texts]), expected, strict=True
    ):
        assert_close(logits, wanted)
    decoder, sequences = PagedDecoder(artifact, seed=1), [Text(text) for text in texts]
    pieces: list[list[Tensor]] = [[] for _ in texts]
    draw = random.Random(0)
    while left := [i for i, s in enumerate(sequences) if s.num_computed < len(s.token_ids)]:
        chunks = []
        for i in left:
            remaining = len(texts[i]) - sequences[i].num_computed
            chunks.append((sequences[i], min(remaining, draw.choice([1, 1, 3, 17]))))
        for i, logits in zip(left, decoder.step(chunks), strict=True):
            pieces[i].append(logits)
    for rows, wanted in zip(pieces, expected, strict=True):
        assert_close(torch.cat(rows), wanted)
    ids = model.generate(
        torch.tensor([texts[2]]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    text = Text(list(texts[2]))
    decoder.step([(text, len(texts[2]) - 1)])
    for _ in range(8):
        text.token_ids.append(int(decoder.step([(text, 1)])[0].argmax()))
    assert text.token_ids == ids[0].tolist()
