"""A whole decoder on our Triton kernels beside the torch reference, over mixed steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import FAMILIES
from tests.parity.paged import PagedDecoder, Text
from tests.tiny import make_tiny_artifact

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
