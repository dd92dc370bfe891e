"""Guesses of a second, smaller model of the same tokenizer, for all sequences of a step at once.

It runs on a `Runner` of its own with blocks of its own: each sequence has a shadow here that holds
the tokens whose KV the small model has. A shadow's draws have the sequence's own seed and sampling,
so that both models' draws agree wherever their distributions do, at any temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import replace

from torchweave_ray.config import CacheConfig
from torchweave_ray.engine.block_manager import BlockManager
from torchweave_ray.engine.plan import Runner, ScheduledSequence, StepOutput, StepPlan, StepResult
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.engine.speculation.drafter import Round, Wanted

_OVERLAP = 2
"""Tokens that a guess's first step computes anyway: the last one, and the last guess if right."""


class _Shadow:
    """A sequence as the small model knows it: `seq.token_ids` are the tokens known for certain,
    then guesses; `seq.num_computed_tokens` of them are in its cache."""

    __slots__ = ("is_lost", "num_known", "num_published", "seq")

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self.num_known = 0
        self.num_published = 0
        """Positions that the prefix cache was told of."""
        self.is_lost = False
        """The model cannot read it, or gave nothing to draw from: it is not asked again."""


class DraftModel:
    """A `Proposer`."""

    method = "draft"
    acceptance = 0.8

    def __init__(
        self,
        runner: Runner,
        cache: CacheConfig,
        vocab_size: int,
        share: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`vocab_size`: the served model's; a token beyond either's is never proposed or read.
        `share`: what one of its steps takes, of one of the served model's, until it is measured."""
        assert runner.limits.step_depth == 0
        self._runner = runner
        self._blocks = BlockManager(runner.limits, cache)
        self._most_tokens = runner.limits.max_model_len
        self._vocab_size = vocab_size
        self._clock = clock
        self._shadows: dict[int, _Shadow] = {}
        self._rounds: list[Round] = []
        self.share = share

    def lag(self, seq: Sequence, end: int) -> int:
        shadow = self._caught_up(seq, end)
        if shadow.is_lost or end > self._most_tokens:
            return 0  # it will not be guessed for
        return max(0, end - shadow.seq.num_computed_tokens - _OVERLAP)

    def propose(self, wanted: Several[Wanted]) -> list[list[int]]:
        shadows = [self._caught_up(each.seq, each.end) for each in wanted]
        guesses: list[list[int]] = [[] for _ in wanted]
        alive = self._first_round(wanted, shadows, guesses)
        while alive := [
            i
            for i in alive
            if len(guesses[i]) < wanted[i].num
            and not shadows[i].is_lost
            and not self._is_end(wanted[i], guesses[i])
        ]:
            entries = [_entry(shadows[i].seq, wanted[i].entry) for i in alive]
            self._note(alive, shadows, guesses, self._run(entries))
        return [self._sayable(each) for each in guesses]

    def release(self, seq_id: int) -> None:
        shadow = self._shadows.pop(seq_id, None)
        if shadow is not None:
            self._blocks.release(shadow.seq, None)
            self._runner.release(seq_id)

    def take_rounds(self) -> list[Round]:
        rounds, self._rounds = self._rounds, []
        return rounds

    def forget_cache(self) -> None:
        assert not self._shadows, "a sequence is drafted for"
        self._blocks.forget_cache()

    def close(self) -> None:
        self._shadows.clear()
        self._runner.close()

    def check_integrity(self, seq_ids: Iterable[int]) -> None:
        """Assert that blocks add up and that no shadow outlives its sequence; for tests."""
        self._blocks.check_integrity(shadow.seq for shadow in self._shadows.values())
        assert self._shadows.keys() <= set(seq_ids), "a shadow was forgotten"

    def _caught_up(self, seq: Sequence, end: int) -> _Shadow:
        """The shadow, told what of its guesses came true, and what came instead."""
        shadow = self._shadows.get(seq.seq_id)
        if shadow is None:
            shadow = self._shadows[seq.seq_id] = self._new_shadow(seq, end)
        own, known = shadow.seq, shadow.num_known
        if known == end:
            return shadow
        right = known
        while right < min(end, len(own.token_ids)) and own.token_ids[right] == seq.token_ids[right]:
            right += 1
        if right < own.num_computed_tokens:
            own.num_computed_tokens = right
            self._runner.release(seq.seq_id)  # what it counted for penalties did not come
        own.token_ids[known:] = seq.token_ids[known:end]
        shadow.num_known = end
        self._blocks.commit(own, shadow.num_published, own.num_computed_tokens)
        shadow.num_published = own.num_computed_tokens
        return shadow

    def _new_shadow(self, seq: Sequence, end: int) -> _Shadow:
        own = Sequence(seq.seq_id, seq.state, seq.index, seq.max_total_tokens, seq.arrival_step)
        own.token_ids = list(seq.token_ids[:end])
        own.block_hashes = seq.block_hashes  # of the same tokens
        shadow = _Shadow(own)
        shadow.is_lost = _largest_id(own) >= self._runner.limits.vocab_size
        if not shadow.is_lost:
            self._blocks.share(own, self._blocks.shared_prefix(own))
        shadow.num_known, shadow.num_published = end, own.num_computed_tokens
        return shadow

    def _first_round(
        self, wanted: Several[Wanted], shadows: Several[_Shadow], guesses: list[list[int]]
    ) -> list[int]:
        """Compute what the shadows lack, and the first guess of those that are then up to date."""
        entries, rows = [], []
        for i, (each, shadow) in enumerate(zip(wanted, shadows, strict=True)):
            start = shadow.seq.num_computed_tokens
            stop = min(each.end, start + each.max_lag + _OVERLAP)
            is_whole = stop == each.end and each.num > 0
            last = max(stop, each.end + each.num - 1) if is_whole else stop
            fits = last <= self._most_tokens and not shadow.is_lost
            if stop > start and fits and self._blocks.grow(shadow.seq, last):
                output = StepOutput.SAMPLE if is_whole else StepOutput.NONE
                entries.append(_entry(shadow.seq, each.entry, stop, output))
                rows.append(i)
        if entries:
            self._note(rows, shadows, guesses, self._run(entries))
        return [i for i in rows if guesses[i]]

    def _run(self, entries: list[ScheduledSequence]) -> StepResult:
        plan = StepPlan(tuple(entries))
        started_at = self._clock()
        result = self._runner.submit(plan).result()
        seconds = self._clock() - started_at
        self._rounds.append(Round(len(entries), plan.num_tokens, seconds))
        for entry in entries:
            own = self._shadows[entry.seq_id].seq
            own.num_computed_tokens = entry.start + entry.num_tokens
        return result

    def _note(
        self,
        rows: Several[int],
        shadows: Several[_Shadow],
        guesses: list[list[int]],
        result: StepResult,
    ) -> None:
        for i, drawn in zip(rows, result.token_ids, strict=True):
            shadow = shadows[i]
            shadow.seq.token_ids += drawn
            guesses[i] += drawn
            shadow.is_lost |= shadow.seq.seq_id in result.failed

    def _is_end(self, wanted: Wanted, guesses: list[int]) -> bool:
        """Nothing follows these guesses: the text is over, or the served model lacks the token."""
        sampling = wanted.entry.sampling
        eos = self._runner.limits.eos_token_ids
        last = guesses[-1]
        is_eos = last in eos and not sampling.ignore_eos
        return is_eos or last in sampling.stop_token_ids or last >= self._vocab_size

    def _sayable(self, guesses: list[int]) -> list[int]:
        beyond = [i for i, token_id in enumerate(guesses) if token_id >= self._vocab_size]
        return guesses[: beyond[0]] if beyond else guesses


def _entry(
    own: Sequence,
    entry: ScheduledSequence,
    stop: int | None = None,
    output: StepOutput = StepOutput.SAMPLE,
) -> ScheduledSequence:
    """Positions of a shadow from where it is to `stop`, by default all; drawn as `entry` is."""
    start = own.num_computed_tokens
    stop = len(own.token_ids) if stop is None else stop
    return ScheduledSequence(
        seq_id=own.seq_id,
        start=start,
        num_tokens=stop - start,
        token_ids=own.token_ids,
        num_prompt_tokens=entry.num_prompt_tokens,
        block_tables=own.block_tables,
        sampling=replace(entry.sampling, logprobs=None, prompt_logprobs=None),
        seed=entry.seed,
        output=output,
        banned_token_ids=entry.banned_token_ids,
    )


def _largest_id(own: Sequence) -> int:
    """Of all that its text and its sampling name: padding makes some vocabularies longer."""
    sampling = own.state.request.sampling
    return max(
        *own.token_ids,
        *sampling.logit_bias,
        *(sampling.allowed_token_ids or ()),
        *sampling.stop_token_ids,
        *(token_id for word in sampling.bad_words for token_id in word),
    )
