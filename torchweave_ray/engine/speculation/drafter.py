"""Draft tokens of a step: guesses at what comes next, which the step's own draws verify.

A proposer guesses (ngram.py, draft_model.py); how many guesses are worth their time is decided
here, from how many of a sequence's last ones were right and from what they take. No tensors:
runners verify.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from typing import Protocol

from torchweave_ray.config import SpeculationConfig
from torchweave_ray.engine.block_manager import BlockManager
from torchweave_ray.engine.plan import ScheduledSequence, StepOutput, StepPlan
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.engine.speculation.costs import (
    Acceptance,
    Costs,
    GuessTimes,
    StepTimes,
    least_acceptance,
    most_worth,
)
from torchweave_ray.engine.step_builder import ScheduledItem, StepBuilder

_FADE, _FADE_OF_ALL = 0.9, 0.99
"""What a step's outcome weighs after the next one that had drafts: for its sequence, and for the
first guess at others."""
_FORGET, _FORGET_OF_ALL = 0.97, 0.999
"""The same after a step whose drafts were not worth it: a text that begins to repeat itself is
tried again after a while."""
_PREDICTION_SHARE = 2.0
"""A draft's row is drawn, too, and in a small batch: it costs more than a prompt's token."""
_LEAST_SHARE = 0.75
"""What is measured of a row is believed down to that share of the prediction: through steps that
other processes make long, a line lies flat."""
_LEAST_REST = 64
"""Tokens that a sequence is taken to have before it: that many, or as many as it has made."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Guesses for one sequence."""

    seq: Sequence
    entry: ScheduledSequence
    end: int
    """They follow seq.token_ids[:end]."""
    num: int
    """At most so many; 0: only catch up."""
    max_lag: int
    """Tokens that may be computed before the first guess."""


@dataclass(frozen=True, slots=True)
class Round:
    """A step that a proposer took."""

    num_rows: int
    num_tokens: int
    seconds: float


class Proposer(Protocol):
    """Guesses for all sequences of a step at once."""

    method: str
    acceptance: float
    """How often its guesses are right, before that is measured."""
    share: float
    """What a round of guesses takes, of a step on as many rows, before that is measured."""

    def lag(self, seq: Sequence, end: int) -> int:
        """Tokens of seq.token_ids[:end] that it has to compute before it can guess, beside those
        that guessing computes anyway."""
        ...

    def propose(self, wanted: Several[Wanted]) -> list[list[int]]: ...

    def release(self, seq_id: int) -> None:
        """The sequence is over or preempted. The id may come again."""
        ...

    def take_rounds(self) -> list[Round]:
        """Since the last call."""
        ...

    def forget_cache(self) -> None:
        """What it holds for no sequence is gone."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Candidate:
    index: int
    """Of its item in the step."""
    item: ScheduledItem
    most: int
    acceptance: float

    @property
    def end(self) -> int:
        return self.item.entry.start + 1


class Drafter:
    """Gives the decodes of a step their drafts."""

    def __init__(
        self,
        proposer: Proposer,
        config: SpeculationConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: the engine's."""
        self._proposer = proposer
        self._most = config.max_draft_tokens
        self._clock = clock
        self._acceptance = Acceptance()
        self._step_times = StepTimes()
        self._guess_times = GuessTimes(proposer.share)
        self._guessing_s = 0.0
        """Of the step in the making."""
        self.method = proposer.method
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def add_drafts(self, step: StepBuilder, blocks: BlockManager) -> None:
        """Comes last: takes what budget and blocks nobody else of the step wants."""
        started_at = self._clock()
        num_draws = _num_draws(step)
        costs = self._costs(step, num_draws)
        if costs is not None:
            candidates = self._candidates(step, least_acceptance(num_draws, costs))
            wanted = self._wanted(step, candidates, num_draws, costs)
            if wanted:
                guesses = self._proposer.propose([each for _, each in wanted])
                for (index, each), drafts in zip(wanted, guesses, strict=True):
                    _put(step, index, each, drafts, blocks)
                self._note_rounds()
        self._guessing_s = self._clock() - started_at

    def note(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        """How many drafts of a submitted step were right."""
        _state(seq).note(num_drafts, num_accepted, _FADE)
        self._acceptance.note(num_drafts, num_accepted, _FADE_OF_ALL)
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted

    def note_step(self, seconds: float, plan: StepPlan) -> None:
        """One step of the engine took so long, from scheduling to its outputs."""
        if all(entry.num_tokens == 1 for entry in plan.sequences):
            self._step_times.note(plan.num_tokens, max(0.0, seconds - self._guessing_s))

    def release(self, seq_id: int) -> None:
        self._proposer.release(seq_id)

    def forget_cache(self) -> None:
        self._proposer.forget_cache()

    def close(self) -> None:
        self._proposer.close()

    def _costs(self, step: StepBuilder, num_draws: int) -> Costs | None:
        """None: nothing can be drafted."""
        if not num_draws:
            return None
        step_s, row_s = self._step_times.step_s(num_draws), self._step_times.row_s
        if step_s is None and self._guess_times.share > 0:
            return None  # first see what is to be saved
        step_s = step_s or step.budget.ms / 1e3 or 1.0
        price = _PREDICTION_SHARE * step.budget.price(step.items[0].entry.start, num_draws)
        predicted_s = price * step_s / num_draws
        if row_s is None:
            row_s = predicted_s
        return Costs(step_s, max(row_s, _LEAST_SHARE * predicted_s), self._round_s)

    def _round_s(self, num_rows: int) -> float:
        return self._guess_times.share * (self._step_times.step_s(num_rows) or 0.0)

    def _candidates(self, step: StepBuilder, least: float) -> list[_Candidate]:
        """Those whose guesses may be right often enough. It is asked for in every step, of all."""
        prior = self._acceptance.rate(self._proposer.acceptance)
        found = []
        for index, item in enumerate(step.items):
            if _may_draft(item):
                state = _state(item.seq)
                acceptance = state.rate(prior)
                if acceptance > least:
                    found.append(_Candidate(index, item, self._most_of(item), acceptance))
                else:
                    state.fade(_FORGET)
        return found

    def _wanted(
        self, step: StepBuilder, candidates: Several[_Candidate], num_draws: int, costs: Costs
    ) -> list[tuple[int, Wanted]]:
        """With their items' indices."""
        acceptances, most = [c.acceptance for c in candidates], [c.most for c in candidates]
        outcome = most_worth(acceptances, most, num_draws, costs)
        if not any(outcome.num_guesses):
            self._acceptance.fade(_FORGET_OF_ALL)
        wanted = []
        for i, (candidate, num) in enumerate(zip(candidates, outcome.num_guesses, strict=True)):
            if not num:
                _state(candidate.item.seq).fade(_FORGET)
                continue
            seq, end = candidate.item.seq, candidate.end
            lag, max_lag = self._proposer.lag(seq, end), 0
            if lag:
                saved_s = outcome.seconds * outcome.tokens[i] / sum(outcome.tokens)
                if not self._pays(seq, lag, saved_s, outcome.tokens[i]):
                    continue
                max_lag = step.budget.chunk(end - lag, lag)
                step.budget.take_chunk(end - lag, max_lag)
            num = step.budget.chunk(end, num) if max_lag == lag else 0
            if num or max_lag:
                wanted.append(
                    (candidate.index, Wanted(seq, candidate.item.entry, end, num, max_lag))
                )
        return wanted

    def _pays(self, seq: Sequence, lag: int, saved_s: float, tokens_a_step: float) -> bool:
        """Whether what a step saves will make up for catching up first."""
        rest = min(
            seq.max_total_tokens - len(seq.token_ids), max(_LEAST_REST, seq.num_output_tokens)
        )
        num_steps = rest / (1.0 + tokens_a_step)
        return saved_s * num_steps > lag * self._guess_times.token_s(
            self._step_times.step_s(1) or 0
        )

    def _note_rounds(self) -> None:
        for each in self._proposer.take_rounds():
            step_s = self._step_times.step_s(each.num_rows) or 0.0
            self._guess_times.note(each.num_rows, each.num_tokens, each.seconds, step_s)

    def _most_of(self, item: ScheduledItem) -> int:
        # The draw after the last draft must still be one of the sequence's tokens.
        most = min(self._most, item.seq.max_total_tokens - item.entry.start - 2)
        if item.entry.banned_token_ids:
            # Bans hold for all draws of a step: drafts that outlast min_tokens wait for the next.
            room = item.seq.state.request.sampling.min_tokens - item.entry.output_index - 1
            most = min(most, room)
        return max(0, most)


def _put(
    step: StepBuilder, index: int, wanted: Wanted, drafts: list[int], blocks: BlockManager
) -> None:
    """Have the step verify what was guessed, as far as there are blocks for it."""
    seq, end = wanted.seq, wanted.end
    del drafts[step.budget.chunk(end, len(drafts)) :]
    if not blocks.grow_spare(seq, end + len(drafts)):
        del drafts[blocks.num_positions(seq) - end :]
    if drafts:
        step.budget.take_chunk(end, len(drafts))
        item = step.items[index]
        step.items[index] = replace(item, entry=replace(item.entry, draft_token_ids=tuple(drafts)))


def _num_draws(step: StepBuilder) -> int:
    return sum(item.entry.output is StepOutput.SAMPLE for item in step.items)


def _state(seq: Sequence) -> Acceptance:
    if seq.drafts is None:
        seq.drafts = Acceptance()
    return seq.drafts


def _may_draft(item: ScheduledItem) -> bool:
    """A decode whose token before is known, of a sequence that shares its steps."""
    seq, entry = item.seq, item.entry
    return (
        entry.output is StepOutput.SAMPLE
        and entry.num_tokens == 1
        and entry.output_index > 0
        and not seq.state.request.exclusive
    )
