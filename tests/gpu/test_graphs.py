"""Graphs of decodes, but for the device's own part: sizes, padding, when one is made anew.

In place of a CUDA graph stands one that runs again what it was given, over the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import make_tiny_artifact
from torchweave_ray.engine.kv_groups import KVGroups
from torchweave_ray.engine.plan import RuntimeLimits, ScheduledSequence, StepOutput, StepPlan
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights
from torchweave_ray.runner.graphs import DecodeGraphs, GraphExecutor, Ladder
from torchweave_ray.runner.inputs import Chunk, Padding
from torchweave_ray.runner.kv_cache import KVCache, KVShape
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.sampling_params import SamplingParams

pytest.importorskip("triton", reason="triton, the language of the kernels, is not installed")
from torchweave_ray.attention.triton_paged import TritonPagedAttention
from torchweave_ray.kernels.triton.ops import TritonOps

BLOCK = 16
PROMPTS = [[3, 9, 27], [81, 5], [7, 7, 7, 1]]


class Again:
    """A `Graph`: a replay is the same call, its result put where the first one was."""

    num_captured = num_replays = 0

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        Again.num_captured += 1
        self._run, self._result = run, run()
        return self._result

    def replay(self) -> None:
        Again.num_replays += 1
        self._result.copy_(self._run())


def _sequence(seq_id: int, tokens: list[int], start: int, **fields: object) -> ScheduledSequence:
    values: dict[str, object] = {"sampling": SamplingParams(temperature=0.0), "adapter_id": ""}
    return ScheduledSequence(
        seq_id=seq_id, start=start, num_tokens=len(tokens) - start, token_ids=tokens,
        num_prompt_tokens=len(PROMPTS[seq_id]), block_tables=([1 + seq_id], [5 + seq_id]), seed=0,
        **(values | fields),  # type: ignore[arg-type]
    )  # fmt: skip


def test_sizes() -> None:
    assert Ladder(1, 64).sizes == (1,)
    assert Ladder(20, 64).sizes == (1, 2, 4, 8, 16, 20)
    sizes = Ladder(300, 64).sizes
    assert (sizes[:4], sizes[-3:]) == ((1, 2, 4, 8), (256, 288, 300))


def test_what_fits_and_what_does_not() -> None:
    ladder = Ladder(6, 4096)
    decode = Chunk(_sequence(0, [0] * 700, 699))
    assert ladder.fit([decode], BLOCK) == Padding(1, 1024 // BLOCK)
    assert ladder.fit([decode] * 3, BLOCK) == Padding(4, 1024 // BLOCK)
    assert ladder.fit([decode] * 5, BLOCK) == Padding(6, 1024 // BLOCK)
    assert ladder.fit([decode] * 7, BLOCK) is None
    assert Ladder(6, 800).fit([decode], BLOCK) == Padding(1, 800 // BLOCK)
    prompt = Chunk(_sequence(0, [0] * 8, 0))
    with_adapter = Chunk(_sequence(0, [0] * 8, 7, adapter_id="a"))
    with_draft = Chunk(_sequence(0, [0] * 8, 7), (5,))
    pooled = Chunk(_sequence(0, [0] * 8, 7, output=StepOutput.POOL))
    for other in (prompt, with_adapter, with_draft, pooled):
        assert ladder.fit([decode, other], BLOCK) is None


def test_replayed_decodes_give_the_tokens_of_plain_ones(
    tmp_path: Path, device: torch.device
) -> None:
    """Of a model with two KV groups, whose blocks lie in the same memory."""
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    artifact = make_tiny_artifact(tmp_path, num_hidden_layers=2, **heads)
    config = ModelConfig.read(artifact)
    spec = build_spec(config)
    weights = load_weights(artifact, config, torch.float32, device)
    executor = TorchExecutor(spec, weights, TritonPagedAttention(), TritonOps())
    groups = KVGroups(1, 1, kept_blocks=5, max_chunk=64, chunk_blocks=5)
    limits = RuntimeLimits(8, BLOCK, 64, spec.vocab_size, (), groups=groups)
    shape = KVShape(
        1, spec.num_kv_heads, BLOCK, spec.head_dim, torch.float32, places=((0, 0), (1, 0))
    )
    plain = ModelRunner(executor, KVCache(shape, 8, device), limits, device)
    graphs = DecodeGraphs(Ladder(4, 64), Again)
    replayed = ModelRunner(executor, KVCache(shape, 8, device), limits, device, graphs=graphs)
    Again.num_captured = Again.num_replays = 0
    assert _generate(replayed) == _generate(plain)
    assert Again.num_captured == 2  # of one and of four sequences, up to 64 positions
    assert Again.num_replays == 3


def _generate(runner: ModelRunner) -> list[list[int]]:
    """Prompts at once, then decodes of all three, then of the first alone."""
    texts = [list(prompt) for prompt in PROMPTS]
    starts = [0, 0, 0]
    for group in ([0, 1, 2], [0, 1, 2], [0, 1, 2], [0]):
        plan = StepPlan(tuple(_sequence(i, texts[i], starts[i]) for i in group))
        result = runner.submit(plan).result()
        for i, tokens in zip(group, result.token_ids, strict=True):
            starts[i] = len(texts[i])
            texts[i] += tokens
    assert not any(kv.keys[0].any() for kv in runner._kv_cache.layers)  # block 0 is nobody's
    return texts


def test_another_cache_is_captured_anew(device: torch.device) -> None:
    made = []

    class Counted(Again):
        def __init__(self) -> None:
            made.append(self)

    class Sums:
        name = "sums"

        def forward(self, inputs, kv):  # type: ignore[no-untyped-def]
            return inputs.positions[:, None].float() + kv[0]

        def hidden(self, inputs, kv):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    from torchweave_ray.runner.inputs import build_inputs

    executor = GraphExecutor(Sums(), Counted, 4)
    chunks = [Chunk(_sequence(0, [0] * 8, 7)), Chunk(_sequence(1, [0] * 6, 5))]
    groups = KVGroups(1, 1, kept_blocks=5, max_chunk=64, chunk_blocks=5)
    inputs = build_inputs(chunks, BLOCK, device, padding=Padding(4, 2), groups=groups)
    assert inputs.slots_of(1).tolist() == [5 * BLOCK + 7, 6 * BLOCK + 5, -1, -1]
    assert inputs.tables_of(1).tolist() == [[5, 0], [6, 0], [0, 0], [0, 0]]
    first, second = (10.0,), (20.0,)
    for kv, expected in ((first, [17.0, 15.0]), (first, [17.0, 15.0]), (second, [27.0, 25.0])):
        logits = executor.forward(inputs, kv)  # type: ignore[arg-type]
        assert logits[:, 0].tolist() == expected
    assert len(made) == 2
