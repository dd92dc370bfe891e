"""Where all layers slide, blocks behind the window are never read again: others may have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, WINDOW
from tests.kernels.native import NativeDecoder
from tests.parity.paged import PagedDecoder, Text, random_texts
from tests.tiny import make_tiny_artifact
from torchweave_ray.kernels.kv_layout import TILE
from torchweave_ray.kernels.library import KernelsUnavailable, load_library
from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    return make_tiny_artifact(folder, dtype=torch.bfloat16, **FAMILIES["mistral"])


def _decoder(artifact: Path, executor: str) -> PagedDecoder:
    if executor == "torch":
        return PagedDecoder(artifact, block_size=16)
    try:
        return NativeDecoder(artifact, load_library())
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def _run(decoder: PagedDecoder, text: list[int], spoil: bool) -> Tensor:
    sequence, rows = Text(text), []
    while (left := len(text) - sequence.num_computed) > 0:
        rows += decoder.step([(sequence, min(left, 23 if left > 40 else 1))])
        if not spoil:
            continue
        dropped = max(0, sequence.num_computed - WINDOW - TILE) // decoder.block_size
        for layer in decoder.kv:
            for block in sequence.block_table[:dropped]:
                layer.keys[block] = torch.nan
                layer.values[block] = torch.nan
    return torch.cat(rows)


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_what_was_dropped_may_hold_anything(artifact: Path, executor: str) -> None:
    """Past many windows, splits and tiles of the kernels, in chunks and then token by token."""
    text = random_texts(160 if executor == "torch" else 640)[0]
    expected, got = (_run(_decoder(artifact, executor), text, spoil) for spoil in (False, True))
    assert torch.equal(got, expected)


def test_a_window_leaves_room_for_others(artifact: Path) -> None:
    """Three texts that need 25 blocks each while they are whole, in 30: none is preempted."""
    _decoder(artifact, "native")
    prompts = random_texts(180, 190, 200)
    greedy = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    block_bytes = 2 * FAMILIES["mistral"]["num_hidden_layers"] * 2 * 16 * 32 * 2
    cache = {"kv_memory": 30 * block_bytes, "watermark": 0.0}
    answers = []
    for batches in ([prompts], [[prompt] for prompt in prompts]):
        with LLM(artifact, max_model_len=400, cache=cache, runner={"executor": "native"}) as llm:
            done = [c.token_ids for batch in batches for c in llm.generate(batch, greedy)]
            answers.append(done)
            stats = llm.stats()
            assert (stats.num_blocks, stats.num_preemptions) == (30, 0)
    assert answers[0] == answers[1]
