"""Logit edits and logprobs against their definitions, and a step's flat batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from torchweave_ray.engine.plan import ScheduledSequence, StepOutput
from torchweave_ray.runner.inputs import Chunk, build_inputs
from torchweave_ray.runner.logits import LogitsEdit, TokenCounts, edit_logits, is_constrained
from torchweave_ray.runner.logprobs import token_logprobs
from torchweave_ray.sampling_params import SamplingParams

VOCAB = 70
PLAIN = SamplingParams()


def _counts(prompt: list[int], output: list[int]) -> TokenCounts:
    counts = TokenCounts()
    whole = [*prompt, *output]
    for num in range(len(prompt), len(whole) + 1):
        counts.advance(whole, num, len(prompt))
    return counts


def test_edits_run_in_the_pinned_order_and_spare_other_rows() -> None:
    params = SamplingParams(
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={3: 4.0, 5: -1.0, 9: 100.0},
    )
    logits = torch.linspace(-3, 3, VOCAB).repeat(3, 1)
    before = logits.clone()
    allowed = np.full(3, -1, dtype=np.int32)
    allowed[0] &= ~np.int32(1 << 6)
    edit_logits(logits, [LogitsEdit(1, params, (9,), _counts([3, 5, 6], [5, 5, 60]), allowed)])

    expected = before[1].clone()
    expected[9] = -torch.inf  # banned; no bias brings it back
    expected[3] += 4.0
    expected[5] -= 1.0
    for token_id, count in {3: 0, 5: 2, 6: 0, 60: 1}.items():
        value = expected[token_id]
        expected[token_id] = value / 2 if value > 0 else value * 2
        expected[token_id] -= 0.5 * (count > 0) + 0.25 * count
    expected[6] = -torch.inf
    torch.testing.assert_close(logits[1], expected, rtol=0, atol=1e-6)
    assert torch.equal(logits[[0, 2]], before[[0, 2]])


def test_a_bitmask_covers_a_vocabulary_that_is_no_multiple_of_32() -> None:
    logits = torch.zeros(1, VOCAB)
    words = np.zeros(3, dtype=np.int32)
    words[2] = 1 << (69 - 64)
    words[0] = np.int32(-(2**31))
    edit_logits(logits, [LogitsEdit(0, PLAIN, allowed=words)])
    assert torch.isfinite(logits[0]).nonzero()[:, 0].tolist() == [31, 69]
    assert is_constrained(words)
    assert not is_constrained(np.full(3, -1, dtype=np.int32))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_bitmask_forbids_all_but_its_bits(share: float) -> None:
    draw = np.random.default_rng(3)
    allowed = draw.random((2, 96)) < share
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(3, VOCAB)
    expected = logits.clone()
    for row, bits in zip((0, 2), allowed, strict=True):
        expected[row, torch.from_numpy(~bits[:VOCAB])] = -torch.inf
    edit_logits(
        logits, [LogitsEdit(r, PLAIN, allowed=w) for r, w in zip((0, 2), words, strict=True)]
    )
    assert torch.equal(logits, expected)


def test_counts_grow_past_their_first_room_and_copy_for_drafts() -> None:
    counts = _counts(list(range(100)), [])
    drafted = counts.with_output([7, 7, 200])
    ids, occurrences = drafted.arrays()
    assert dict(zip(ids.tolist(), occurrences.tolist(), strict=True)) == {
        **dict.fromkeys(range(100), 0.0),
        7: 2.0,
        200: 1.0,
    }
    assert counts.arrays()[1].sum() == 0
    assert len(counts.arrays()[0]) == 100


def test_logprobs_are_log_softmax_with_rank_and_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 5.0, 1.0]])
    first, second = token_logprobs(logits, [0, 2], [3, 0])
    expected = torch.log_softmax(logits, dim=-1)
    assert first.rank == 3
    assert first.logprob == pytest.approx(expected[0, 0].item(), abs=1e-6)
    assert [token_id for token_id, _ in first.top] == [1, 2, 0]
    assert first.top[0][1] == pytest.approx(expected[0, 1].item(), abs=1e-6)
    assert (second.token_id, second.rank, second.top) == (2, 1, ())


def test_logprobs_of_many_rows_are_those_of_each() -> None:
    logits = torch.randn(150, VOCAB, generator=torch.Generator().manual_seed(0))
    ids = [i % VOCAB for i in range(150)]
    together = token_logprobs(logits, ids, [2] * 150)
    assert together[149] == token_logprobs(logits[149:], ids[149:], [2])[0]
    assert math.isclose(together[3].top[0][1], torch.log_softmax(logits[3], 0).max().item())


def _scheduled(
    start: int, num: int, token_ids: list[int], table: list[int], **kwargs: Any
) -> ScheduledSequence:
    return ScheduledSequence(
        seq_id=0,
        start=start,
        num_tokens=num,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        block_tables=(table,),
        sampling=PLAIN,
        seed=0,
        **kwargs,
    )


def test_a_batch_mixes_decodes_chunks_drafts_and_prompt_logprobs() -> None:
    chunks = [
        Chunk(_scheduled(5, 1, [10, 11, 12, 13, 14, 15], [7, 2])),
        Chunk(_scheduled(0, 3, [20, 21, 22, 23], [5], output=StepOutput.NONE)),
        Chunk(_scheduled(3, 1, [30, 31, 32, 33], [9, 1, 4]), draft_token_ids=(34, 35)),
        Chunk(_scheduled(1, 2, [40, 41, 42, 43], [3], output=StepOutput.PROMPT_LOGPROBS)),
    ]
    inputs = build_inputs(chunks, 4, torch.device("cpu"))
    assert inputs.input_ids.tolist() == [15, 20, 21, 22, 33, 34, 35, 41, 42]
    assert inputs.positions.tolist() == [5, 0, 1, 2, 3, 4, 5, 1, 2]
    assert inputs.slot_mapping.tolist() == [9, 20, 21, 22, 39, 4, 5, 13, 14]
    assert inputs.query_start_loc.tolist() == [0, 1, 4, 7, 9]
    assert inputs.seq_lens.tolist() == [6, 3, 6, 3]
    assert inputs.block_tables.tolist() == [[7, 2], [5, 0], [9, 1], [3, 0]]
    assert inputs.logit_rows.tolist() == [0, 4, 5, 6, 7, 8]
    assert (inputs.max_query_len, inputs.max_seq_len) == (3, 6)
    assert inputs.input_ids.dtype == inputs.slot_mapping.dtype == torch.int64
    assert inputs.seq_lens.dtype == inputs.block_tables.dtype == torch.int32
