"""A runner without a model, for tests: its "KV" of a position is a hash chain over the prefix.

KV is written to slots and read back through the block table, so, like real KV, it depends on the
whole prefix and is wrong as soon as a block is shared, freed or copied wrongly. Also the same
generation computed alone, as the reference, and a letter-per-token detokenizer.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from torchweave_ray.engine.plan import (
    IN_FLIGHT,
    PendingStep,
    RuntimeLimits,
    ScheduledSequence,
    StepOutput,
    StepPlan,
    StepResult,
)
from torchweave_ray.outputs import FinishReason, GenerateRequest, OutputKind, TokenLogprobs

VOCAB = 40
EOS = 0
_MASK = (1 << 61) - 1


def chain(previous: int, token_id: int) -> int:
    return (previous * 1_000_003 + token_id * 7_919 + 12_345) & _MASK


def draw(
    kv: int,
    seed: int,
    output_index: int,
    banned: Sequence[int],
    allowed: Container[int] = range(VOCAB),
) -> int | None:
    """None: nothing is left to draw."""
    first = (kv * 31 + seed * 1_009 + output_index * 17) >> 7
    for token_id in range(first, first + VOCAB):
        if token_id % VOCAB not in banned and token_id % VOCAB in allowed:
            return token_id % VOCAB
    return None


def allowed_tokens(words: NDArray[np.int32]) -> frozenset[int]:
    """A row of a bitmask as token ids."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=VOCAB)
    return frozenset(np.flatnonzero(bits).tolist())


def logprob_of(kv: int, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(kv % 1000), 1)


@dataclass
class _Row:
    """A scheduled sequence as it was at submit."""

    entry: ScheduledSequence
    tokens: list[int]  # of positions start .. start + num_tokens, and drafts
    block_tables: list[list[int]]
    allowed: list[Container[int]]  # at each draw


@dataclass
class EchoStep:
    runner: EchoRunner
    rows: list[_Row]
    copies: tuple[tuple[int, int], ...]
    released: list[int] = field(default_factory=list)
    """Released after this step was submitted: it still sees their state."""

    def result(self) -> StepResult:
        return self.runner.execute(self)


@dataclass
class EchoRunner:
    """Steps are executed when their result is asked for, in order, as a device queue would."""

    limits: RuntimeLimits
    poisoned_seeds: frozenset[int] = frozenset()
    plans: list[StepPlan] = field(default_factory=list)
    kv: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By slot: the KV group that wrote it, and the value."""
    last_sampled: dict[int, int] = field(default_factory=dict)
    queue: deque[EchoStep] = field(default_factory=deque)

    def submit(self, plan: StepPlan) -> PendingStep:
        rows = [
            _Row(
                e,
                [*e.token_ids[e.start : e.start + e.num_tokens], *e.draft_token_ids],
                [list(table) for table in e.block_tables],
                _allowed(plan, i),
            )
            for i, e in enumerate(plan.sequences)
        ]
        step = EchoStep(self, rows, plan.block_copies)
        self.queue.append(step)
        assert len(self.queue) <= self.limits.step_depth + 1
        self.plans.append(plan)
        return step

    def release(self, seq_id: int) -> None:
        if self.queue:
            self.queue[-1].released.append(seq_id)
        else:
            self.last_sampled.pop(seq_id, None)

    def check_health(self) -> None:
        """It is well."""

    def close(self) -> None:
        assert not self.queue

    def execute(self, step: EchoStep) -> StepResult:
        assert self.queue.popleft() is step, "results are asked for in order"
        size = self.limits.block_size
        for source, destination in step.copies:
            for offset in range(size):
                if source * size + offset in self.kv:
                    self.kv[destination * size + offset] = self.kv[source * size + offset]
        token_ids: list[list[int]] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        pooled: dict[int, list[float]] = {}
        failed: dict[int, str] = {}
        for row in step.rows:
            entry = row.entry
            if entry.seed in self.poisoned_seeds:
                failed[entry.seq_id] = "poisoned"
                token_ids.append([])
                continue
            kvs = self._compute(row)
            sampled: list[int] = []
            if entry.output is StepOutput.SAMPLE:
                banned, index = entry.banned_token_ids, entry.output_index
                first = len(kvs) - 1 - len(entry.draft_token_ids)
                for num, allowed in enumerate(row.allowed):
                    token_id = draw(kvs[first + num], entry.seed, index + num, banned, allowed)
                    if token_id is None:
                        failed |= {} if sampled else {entry.seq_id: "nothing allowed"}
                        break
                    sampled.append(token_id)
                    self.last_sampled[entry.seq_id] = token_id
                    if entry.draft_token_ids[num : num + 1] != (token_id,):
                        break
            elif entry.output is StepOutput.PROMPT_LOGPROBS:
                following = entry.token_ids[entry.start + 1 : entry.start + entry.num_tokens + 1]
                prompt_logprobs[entry.seq_id] = [
                    logprob_of(kv, token_id) for kv, token_id in zip(kvs, following, strict=True)
                ]
            elif entry.output is StepOutput.POOL:
                pooled[entry.seq_id] = [float(kvs[-1])]
            elif entry.output is StepOutput.POOL_ALL:
                pooled[entry.seq_id] = [float(sum(kv % 1000 for kv in kvs))]
            token_ids.append(sampled)
        for seq_id in step.released:
            self.last_sampled.pop(seq_id, None)
        return StepResult(token_ids, (), prompt_logprobs, pooled, failed)

    def _check_window(self, row: _Row) -> None:
        """The KV that a model with a window would read is still this sequence's own."""
        groups, entry = self.limits.groups, row.entry
        if not groups.num_sliding:
            return
        seen = entry.start - groups.kept_blocks * self.limits.block_size + 1
        for group in range(groups.num):
            first = 0 if group < groups.num_full else max(0, seen)
            for position in range(first + 1, entry.start):
                token_id = entry.token_ids[position]
                if token_id != IN_FLIGHT:
                    expected = chain(self._read(row, group, position - 1), token_id)
                    assert self._read(row, group, position) == expected

    def _compute(self, row: _Row) -> list[int]:
        """Write this row's KV, each from the one read back before it."""
        entry = row.entry
        assert len(row.block_tables) == self.limits.groups.num
        self._check_window(row)
        kvs = []
        for position, token_id in enumerate(row.tokens, entry.start):
            if token_id == IN_FLIGHT:
                token_id = self.last_sampled[entry.seq_id]
            groups = range(len(row.block_tables))
            before = {self._read(row, group, position - 1) for group in groups} if position else {0}
            (previous,) = before
            kvs.append(chain(previous, token_id))
            for group in groups:
                self.kv[self._slot(row, group, position)] = group, kvs[-1]
        return kvs

    def _read(self, row: _Row, group: int, position: int) -> int:
        writer, value = self.kv[self._slot(row, group, position)]
        assert writer == group, "a block of another group"
        return value

    def _slot(self, row: _Row, group: int, position: int) -> int:
        size = self.limits.block_size
        return row.block_tables[group][position // size] * size + position % size


class Unsure(EchoRunner):
    """A small model: says another token than the one that it drew, now and then."""

    def __init__(self, limits: RuntimeLimits, doubt: float, seed: int = 0) -> None:
        super().__init__(limits)
        self.rng, self.doubt, self.num_wrong = random.Random(seed), doubt, 0

    def execute(self, step: EchoStep) -> StepResult:
        result = super().execute(step)
        tokens = []
        for drawn in result.token_ids:
            is_wrong = bool(drawn) and self.rng.random() < self.doubt
            self.num_wrong += is_wrong
            tokens.append([(drawn[0] + 1) % VOCAB] if is_wrong else drawn)
        return replace(result, token_ids=tokens)


def _allowed(plan: StepPlan, index: int) -> list[Container[int]]:
    num_drafts = len(plan.sequences[index].draft_token_ids)
    if plan.bitmask is None:
        return [range(VOCAB)] * (1 + num_drafts)
    first = plan.bitmask[index]
    behind = plan.draft_bitmasks.get(index, [first] * num_drafts if (first == -1).all() else ())
    assert len(behind) == num_drafts
    return [allowed_tokens(words) for words in (first, *behind)]


class LetterDecoder:
    """Token 7 and its multiples end with a letter that only the next token completes."""

    def __init__(self) -> None:
        self._held = ""

    def step(self, token_id: int) -> str:
        text, self._held = self._held + letter(token_id), ""
        if token_id and token_id % 7 == 0:
            text, self._held = text[:-1], text[-1]
        return text

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


class LetterDetokenizer:
    def decoder(self, skip_special_tokens: bool) -> LetterDecoder:
        return LetterDecoder()


def letter(token_id: int) -> str:
    return "" if token_id == EOS else "abcde"[token_id % 5] * (1 + token_id % 3)


@dataclass(frozen=True)
class Expected:
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    released: list[int]
    """Characters that may have been released after each token."""


AllowedNext = Callable[[Sequence[int]], frozenset[int]]
"""Which tokens may follow these output tokens."""


def expected(
    request: GenerateRequest, index: int, max_model_len: int, allowed: AllowedNext | None = None
) -> Expected:
    """What choice `index` must give, computed alone and by brute force over whole texts."""
    sampling = request.sampling
    kv = 0
    for token_id in request.prompt_token_ids:
        kv = chain(kv, token_id)
    limit = min(sampling.max_tokens or max_model_len, max_model_len - len(request.prompt_token_ids))
    ends = (EOS, *sampling.stop_token_ids)
    tokens: list[int] = []
    decoder = LetterDecoder()
    text = ""
    released: list[int] = []
    while True:
        banned = ends if len(tokens) < sampling.min_tokens else ()
        following = range(VOCAB) if allowed is None else allowed(tokens)
        if following == {EOS}:
            banned = ()  # a complete text is filled up to min_tokens with end tokens
        token_id = draw(kv, sampling.seed + index, len(tokens), banned, following)
        assert token_id is not None, "the grammar and the bans leave nothing"
        tokens.append(token_id)
        kv = chain(kv, token_id)
        past_minimum = len(tokens) > sampling.min_tokens
        is_end = past_minimum and (
            (token_id == EOS and not sampling.ignore_eos) or token_id in sampling.stop_token_ids
        )
        if is_end:
            reason = None if token_id == EOS and not sampling.ignore_eos else token_id
            if sampling.include_stop_str_in_output:
                text += decoder.step(token_id)
            text += decoder.flush()
            return Expected(tokens, text, FinishReason.STOP, reason, released)
        before = len(text)
        text += decoder.step(token_id)
        cut = (
            _first_stop(text, before, sampling.stop) if len(tokens) >= sampling.min_tokens else None
        )
        if cut is not None:
            end, stop = cut
            if not sampling.include_stop_str_in_output:
                end -= len(stop)
            return Expected(tokens, text[:end], FinishReason.STOP, stop, released)
        released.append(len(text) - _held(text, sampling.stop))
        if len(tokens) == limit:
            text += decoder.flush()
            return Expected(tokens, text, FinishReason.LENGTH, None, released)


def _first_stop(text: str, before: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that is complete first, character by character; the longest of several."""
    for end in range(before + 1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return end, max(ending, key=len)
    return None


def _held(text: str, stops: Sequence[str]) -> int:
    sizes = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(sizes, default=0)


def wants_tokens(request: GenerateRequest) -> bool:
    return request.output_kind is not OutputKind.POOLED
