"""ModelRunner on a small executor whose logits are a function of the context read from the KV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV, StepInputs
from torchweave_ray.engine.plan import (
    IN_FLIGHT,
    RuntimeLimits,
    ScheduledSequence,
    StepOutput,
    StepPlan,
    StepResult,
)
from torchweave_ray.runner.drawn import NON_FINITE, NOTHING_LEFT
from torchweave_ray.runner.kv_cache import KVCache, KVShape
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.sampling_params import SamplingParams

VOCAB, BLOCK_SIZE, NUM_BLOCKS = 40, 4, 16
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
POISON = 39
"""A context that ends with this token gives NaN."""


class ContextExecutor:
    """Stores each token in its slot; logits are noise seeded by all tokens up to the row's."""

    name = "context"

    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        contexts = self._contexts(inputs, kv)
        return torch.stack([_logits(c) for c in contexts]) if contexts else torch.zeros(0, VOCAB)

    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        return torch.tensor([[float(sum(c)), float(len(c))] for c in self._contexts(inputs, kv)])

    def _contexts(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> list[list[int]]:
        stored = kv[0].keys.view(-1)
        stored[inputs.slot_mapping] = inputs.input_ids.float()
        owners = torch.bucketize(inputs.logit_rows, inputs.query_start_loc[1:], right=True)
        contexts = []
        for row, owner in zip(inputs.logit_rows.tolist(), owners.tolist(), strict=True):
            positions = torch.arange(int(inputs.positions[row]) + 1)
            blocks = inputs.block_tables[owner][positions // BLOCK_SIZE]
            contexts.append(stored[blocks * BLOCK_SIZE + positions % BLOCK_SIZE].int().tolist())
        return contexts


def _logits(context: Sequence[int]) -> Tensor:
    if context[-1] == POISON:
        return torch.full((VOCAB,), torch.nan)
    seed = hash(tuple(context)) % (1 << 40)
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[POISON] = -100.0
    return logits


def _runner() -> ModelRunner:
    kv_cache = KVCache(KVShape(1, 1, BLOCK_SIZE, 1, torch.float32), NUM_BLOCKS, CPU)
    limits = RuntimeLimits(NUM_BLOCKS, BLOCK_SIZE, 64, VOCAB, (0,))
    return ModelRunner(ContextExecutor(), kv_cache, limits, CPU)


def _sequence(
    token_ids: list[int], start: int, num: int, table: list[int], **kwargs: Any
) -> ScheduledSequence:
    values = {
        "seq_id": table[0],
        "num_prompt_tokens": 4,
        "sampling": GREEDY,
        "seed": 7,
        "output": StepOutput.SAMPLE,
    } | kwargs
    return ScheduledSequence(
        start=start, num_tokens=num, token_ids=token_ids, block_tables=(table,), **values
    )


def _run(runner: ModelRunner, *sequences: ScheduledSequence, **plan: Any) -> StepResult:
    return runner.submit(StepPlan(tuple(sequences), **plan)).result()


def _generate(
    runner: ModelRunner, prompt: list[int], table: list[int], num: int, **kwargs: Any
) -> list[int]:
    """One token a step, as the scheduler does it: the drawn one stands in the list in flight."""
    tokens, start = list(prompt), 0
    while len(tokens) < len(prompt) + num:
        seq = _sequence(
            tokens, start, len(tokens) - start, table, num_prompt_tokens=len(prompt), **kwargs
        )
        tokens.append(IN_FLIGHT)
        ((token_id,),) = _run(runner, seq).token_ids
        start, tokens[-1] = len(tokens) - 1, token_id
    return tokens[len(prompt) :]


HARD = SamplingParams(
    temperature=0.9,
    top_k=20,
    top_p=0.95,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias={5: 1.5},
)


@pytest.mark.parametrize("sampling", [GREEDY, HARD])
def test_chunks_and_a_crowd_give_what_the_whole_prompt_gives_alone(
    sampling: SamplingParams,
) -> None:
    prompt = [3, 9, 27, 11, 4, 6]
    alone = _run(_runner(), _sequence(prompt, 0, 6, [1, 2], sampling=sampling))
    runner = _runner()
    for start, num in ((0, 1), (1, 4)):
        other = _sequence([8, 8, 1], 0, 3, [9])
        chunk = _sequence(prompt, start, num, [5, 3], sampling=sampling, output=StepOutput.NONE)
        result = _run(runner, other, chunk)
        assert [len(tokens) for tokens in result.token_ids] == [1, 0]
    last = _run(runner, _sequence(prompt, 5, 1, [5, 3], sampling=sampling))
    assert last.token_ids == alone.token_ids
    assert last.logprobs == ()


def test_only_chunks_that_give_nothing() -> None:
    result = _run(_runner(), _sequence([1, 2, 3, 4], 0, 2, [0], output=StepOutput.NONE))
    assert result == StepResult([[]])


def test_blocks_are_copied_before_anything_is_computed() -> None:
    prompt = [3, 9, 27, 11, 4, 6]
    runner = _runner()
    first = _run(runner, _sequence(prompt, 0, 6, [1, 2], sampling=HARD))
    fork = _sequence(prompt, 5, 1, [1, 8], sampling=HARD)
    # Block 2 is handed to another sequence of the same step, which writes over it.
    other = _sequence([30, 31, 32, 33], 0, 4, [2])
    assert _run(runner, other, fork, block_copies=((2, 8),)).token_ids[1] == first.token_ids[0]


def test_prompt_logprobs_are_those_of_the_following_tokens() -> None:
    prompt = [3, 9, 27, 11, 4, 6]
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=2)
    scored = _sequence(prompt, 0, 4, [1, 2], sampling=sampling, output=StepOutput.PROMPT_LOGPROBS)
    decode = _sequence([2, 2, 2], 0, 3, [5])
    result = _run(_runner(), decode, scored)
    assert [len(tokens) for tokens in result.token_ids] == [1, 0]
    entries = result.prompt_logprobs[1]
    for position, entry in enumerate(entries):
        expected = torch.log_softmax(_logits(prompt[: position + 1]), dim=-1)
        assert entry.token_id == prompt[position + 1]
        assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-5)
        assert entry.top[0][0] == int(expected.argmax())
        assert len(entry.top) == 2
    assert len(entries) == 4


def test_logprobs_are_raw_and_only_for_those_who_ask() -> None:
    prompt = [3, 9, 27, 11]
    biased = SamplingParams(temperature=0.0, logprobs=1, logit_bias={17: 100.0})
    result = _run(
        _runner(),
        _sequence([1, 2], 0, 2, [4]),
        _sequence(prompt, 0, 4, [1], sampling=biased, banned_token_ids=(2,)),
    )
    assert result.token_ids[1] == [17]
    assert result.logprobs[0] is None
    (entry,) = result.logprobs[1] or ()
    expected = torch.log_softmax(_logits(prompt), dim=-1)
    assert entry.logprob == pytest.approx(expected[17].item(), abs=1e-5)
    assert entry.rank == 1 + int((expected > expected[17]).sum())
    assert entry.top[0][0] == int(expected.argmax()) != 17


def test_pooling_gives_the_last_hidden_state_beside_sampling() -> None:
    result = _run(
        _runner(),
        _sequence([1, 2, 3], 0, 3, [2], output=StepOutput.POOL),
        _sequence([3, 9, 27, 11], 0, 4, [1]),
    )
    assert result.pooled == {2: [6.0, 3.0]}
    assert [len(tokens) for tokens in result.token_ids] == [0, 1]


REPEATING = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={7: 100.0, 8: 80.0})
"""Gives 7, 8, 7, 7: each draw hangs on the one before through the penalty alone."""


@pytest.mark.parametrize(
    "sampling", [GREEDY, HARD, REPEATING, SamplingParams(temperature=1.5, logprobs=1)]
)
def test_drafts_never_change_what_is_drawn(sampling: SamplingParams) -> None:
    prompt = [3, 9, 27, 11]
    truth = _generate(_runner(), prompt, [1, 2, 3], 6, sampling=sampling)
    for num_right in range(4):
        drafts = [*truth[1 : 1 + num_right], *((t + 1) % 39 for t in truth[1 + num_right : 4])]
        runner = _runner()
        _generate(runner, prompt, [1, 2, 3], 1, sampling=sampling)
        tokens = [*prompt, truth[0]]
        drafted = _sequence(
            tokens, 4, 1, [1, 2, 3], sampling=sampling, draft_token_ids=tuple(drafts)
        )
        result = _run(runner, _sequence([5, 5], 0, 2, [9]), drafted)
        assert result.token_ids[1] == truth[1 : 2 + num_right]
        if sampling.logprobs is not None:
            scored = [entry.token_id for entry in result.logprobs[1] or ()]
            assert scored == result.token_ids[1]
        tokens += result.token_ids[1]
        start = len(tokens) - 1
        after = _run(runner, _sequence(tokens, start, 1, [1, 2, 3], sampling=sampling))
        assert after.token_ids == [truth[2 + num_right : 3 + num_right]]


def test_a_bitmask_binds_its_own_sequence_at_each_draw() -> None:
    bitmask = np.full((2, 2), -1, dtype=np.int32)
    bitmask[1] = [1 << 13, 0]
    behind = {1: np.array([[1 << 5, 0], [1 << 7, 0]], dtype=np.int32)}
    prompt = [3, 9, 27, 11]
    free = _sequence([1, 2], 0, 2, [4])
    for drafts, drawn in ((13, 5), [13, 5, 7]), ((13, 6), [13, 5]), ((12, 5), [13]):
        bound = _sequence(prompt, 0, 4, [1, 2], draft_token_ids=drafts)
        result = _run(_runner(), free, bound, bitmask=bitmask, draft_bitmasks=behind)
        assert result.token_ids == [[int(_logits([1, 2]).argmax())], drawn]


@pytest.mark.parametrize("output", [StepOutput.SAMPLE, StepOutput.PROMPT_LOGPROBS])
def test_a_row_that_is_not_finite_fails_alone(output: StepOutput) -> None:
    sampling = SamplingParams(temperature=0.7, logprobs=0)
    good = _sequence([3, 9, 27, 11], 0, 4, [1], sampling=sampling)
    num = 4 if output is StepOutput.SAMPLE else 3
    bad = _sequence([3, POISON, 5, POISON], 0, num, [2], sampling=sampling, output=output)
    result = _run(_runner(), bad, good)
    assert result.failed == {2: NON_FINITE}
    assert result.token_ids[0] == []
    assert result.token_ids[1:] == _run(_runner(), good).token_ids


def test_a_sequence_with_nothing_allowed_fails_alone() -> None:
    bitmask = np.array([[0, 0], [-1, -1]], dtype=np.int32)
    sequences = (_sequence([3, 9], 0, 2, [1]), _sequence([3, 9], 0, 2, [2]))
    result = _run(_runner(), *sequences, bitmask=bitmask)
    assert result.failed == {1: NOTHING_LEFT}
    assert len(result.token_ids[1]) == 1


def test_a_released_sequence_is_counted_anew() -> None:
    """Preempted and recomputed, or another sequence under a number used before."""
    runner = _runner()
    prompt = [3, 9, 27, 11]
    truth = _generate(runner, prompt, [1, 2], 4, sampling=HARD)
    runner.release(1)
    again = _sequence([*prompt, *truth[:3]], 0, 7, [1, 2], sampling=HARD)
    assert _run(runner, again).token_ids == [truth[3:]]
    runner.release(1)
    assert _generate(runner, prompt, [1, 2], 4, sampling=HARD) == truth
    runner.close()
