"""The native executor over a paged cache, and what its logits must be. No test in here."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.parity.paged import PagedDecoder, Text, random_texts
from torchweave_ray.kernels.library import Library
from torchweave_ray.kernels.packing import PackedLinear, pack_linear
from torchweave_ray.kernels.quantization import QuantizedFormat, quantize
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.native_executor import NativeExecutor
from torchweave_ray.models.tensors import fused_tensors
from torchweave_ray.models.weights import load_weights

Formats = Mapping[str, QuantizedFormat]
FORMATS: dict[str, Formats] = {
    "int8": {"proj": "int8", "embed": "int8-group32", "head": "int8-group32"},
    "int4": {"proj": "int4-group32", "embed": "int8-group32", "head": "int8-group32"},
    "mixed": {"down_proj": "int4-group32", "o_proj": "int8", "head": "int8"},
}
"""Which tensors are quantised, by a part of their names; the others stay bf16."""


def quantized_weights(
    config: ModelConfig, weights: Mapping[str, Tensor], formats: Formats
) -> dict[str, Tensor | PackedLinear]:
    packed: dict[str, Tensor | PackedLinear] = dict(weights)
    for tensor in fused_tensors(config):
        weight = weights[tensor.name]
        for part, format in formats.items():
            if part in tensor.name and weight.dim() == 2:
                gated = tensor.packing == "gated"
                packed[tensor.name] = pack_linear(
                    quantize(weight, format), gated, tensor.num_experts
                )
    return packed


class NativeDecoder(PagedDecoder):
    def __init__(
        self,
        artifact: Path,
        library: Library,
        threads: int = 2,
        seed: int = 0,
        formats: Formats | None = None,
    ) -> None:
        super().__init__(artifact, num_blocks=128, block_size=16, dtype=torch.bfloat16, seed=seed)
        config = ModelConfig.read(artifact)
        weights = load_weights(artifact, config, torch.bfloat16, torch.device("cpu"))
        packed = quantized_weights(config, weights, formats or {})
        self.executor = NativeExecutor(self.spec, packed, library, threads)

    def step(
        self, chunks: Sequence[tuple[Text, int]], adapters: Sequence[object] = ()
    ) -> list[Tensor]:
        return [logits.clone() for logits in super().step(chunks, adapters)]


def assert_near_torch(artifact: Path, library: Library) -> None:
    """Nearer to fp32 than torch's own bf16 is, or within 3 %."""
    texts = random_texts(1, 30, 70)
    exact, native = PagedDecoder(artifact), NativeDecoder(artifact, library)
    rounded = PagedDecoder(artifact, dtype=torch.bfloat16)
    outputs = [d.step([(Text(ids), len(ids)) for ids in texts]) for d in (exact, native, rounded)]
    expected, actual, bf16 = (torch.cat(logits) for logits in outputs)
    spread = expected.std()
    bar = max((bf16 - expected).square().mean().sqrt(), 0.03 * spread)
    assert (actual - expected).square().mean().sqrt() < bar
    top = expected.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > max(0.3 * spread, 10 * bar)
    assert clear.any()
    assert torch.equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])


def assert_same_bits_in_any_batch(
    artifact: Path, library: Library, formats: Formats, seeds: Sequence[int] = (1, 2)
) -> None:
    """Alone token by token; in one chunk; in uneven chunks within a crowd; on 1, 2, 3 threads."""
    text, *others = random_texts(61, 3, 40, 25, 9)
    alone = NativeDecoder(artifact, library, 1, formats=formats)
    sequence = Text(text)
    expected = torch.cat([alone.step([(sequence, 1)])[0] for _ in text])
    for threads, seed in itertools.product((1, 2, 3), seeds):
        whole = NativeDecoder(artifact, library, threads, seed, formats)
        assert torch.equal(whole.step([(Text(text), len(text))])[0], expected)
        draw = random.Random(seed)
        crowd = NativeDecoder(artifact, library, threads, seed, formats)
        sequence, left = Text(text), [Text(ids) for ids in others]
        rows = []
        while (rest := len(text) - sequence.num_computed) > 0:
            chunks = [(sequence, min(rest, draw.randint(1, 9)))]
            for other in left:
                if num := min(draw.randint(0, 5), len(other.token_ids) - other.num_computed):
                    chunks.insert(draw.randint(0, len(chunks)), (other, num))
            index = [other is sequence for other, _ in chunks].index(True)
            rows.append(crowd.step(chunks)[index])
        assert torch.equal(torch.cat(rows), expected)
