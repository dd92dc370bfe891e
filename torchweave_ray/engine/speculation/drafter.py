"""Draft tokens of a step: guesses at what comes next, which the step's own draws verify.

A proposer guesses (ngram.py); how many guesses are worth their time is decided here, from how many
of a sequence's last ones were right and from what a token costs. No tensors: runners verify.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as TokenIds
from dataclasses import replace
from typing import Protocol

from torchweave_ray.config import SpeculationConfig
from torchweave_ray.engine.block_manager import BlockManager
from torchweave_ray.engine.plan import StepOutput, StepPlan
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.engine.step_builder import ScheduledItem, StepBuilder

_FADE = 0.9
"""What a step's outcome weighs after the next one that had drafts."""
_FORGET = 0.97
"""The same after a step whose drafts were not worth it: a text that begins to repeat itself is
tried again after a while."""
_STEP_FADE = 0.99
_LEAST_STEPS, _LEAST_VARIANCE = 4, 0.1
_PREDICTION_SHARE = 2.0
"""A draft's row is drawn, too, and in a small batch: it costs more than a prompt's token."""


class DraftState:
    """What is kept of one sequence's drafts; lives as long as the sequence."""

    __slots__ = ("accepted", "rejected", "token_ids")

    def __init__(self) -> None:
        self.accepted = self.rejected = 0.0
        self.token_ids = array("i")
        """Prompt and output as far as a proposer has read them."""

    @property
    def acceptance(self) -> float:
        """Probability that the next draft is right, one half of it before anything is known."""
        return (self.accepted + 1.0) / (self.accepted + self.rejected + 2.0)

    def note(self, num_drafts: int, num_accepted: int) -> None:
        self.accepted = _FADE * self.accepted + num_accepted
        self.rejected = _FADE * self.rejected + (num_accepted < num_drafts)

    def fade(self) -> None:
        self.accepted *= _FORGET
        self.rejected *= _FORGET


class RowCost:
    """What one more row of a decode step takes, as measured: a line through the last steps.

    Least squares, weighted by age. Rows have to differ for that, so steps without drafts forget
    what drafts cost, and after some time it is tried again.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of weights, rows, seconds, rows squared, rows x seconds

    def note(self, num_rows: int, seconds: float) -> None:
        new = (1.0, num_rows, seconds, num_rows * num_rows, num_rows * seconds)
        self._sums = [_STEP_FADE * old + value for old, value in zip(self._sums, new, strict=True)]

    def price(self, num_draws: int) -> float | None:
        """In tokens that a step of `num_draws` rows makes in that time; None: not known."""
        weight, rows, seconds, squares, products = self._sums
        variance = squares * weight - rows * rows
        if weight < _LEAST_STEPS or variance < _LEAST_VARIANCE * weight * weight:
            return None
        slope = max(0.0, (products * weight - rows * seconds) / variance)
        step = seconds / weight + slope * (num_draws - rows / weight)
        return slope * num_draws / step if step > 0 else None


class Proposer(Protocol):
    def propose(
        self, state: DraftState, token_ids: TokenIds[int], end: int, most: int
    ) -> list[int]:
        """At most `most` tokens that may follow token_ids[:end], prompt and output."""
        ...


class Drafter:
    """Gives the decodes of a step their drafts."""

    def __init__(self, proposer: Proposer, config: SpeculationConfig) -> None:
        self._proposer = proposer
        self._most = config.max_draft_tokens
        self._row_cost = RowCost()
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def add_drafts(self, step: StepBuilder, blocks: BlockManager) -> None:
        """Comes last: takes what budget and blocks nobody else of the step wants."""
        drawing = [i for i, item in enumerate(step.items) if _may_draft(item)]
        num_draws = sum(item.entry.output is StepOutput.SAMPLE for item in step.items)
        price = self._row_cost.price(num_draws)
        for i in drawing:
            item = step.items[i]
            if price is None:
                predicted = step.budget.price(item.entry.start + 1, num_draws)
                price = _PREDICTION_SHARE * predicted
            drafts = self._drafts(item, step, price, blocks)
            if drafts:
                step.budget.take_chunk(item.entry.start + 1, len(drafts))
                entry = replace(item.entry, draft_token_ids=tuple(drafts))
                step.items[i] = replace(item, entry=entry)

    def note(self, item: ScheduledItem, num_accepted: int) -> None:
        """How many drafts of a submitted step were right."""
        num_drafts = len(item.entry.draft_token_ids)
        if num_drafts:
            _state(item.seq).note(num_drafts, num_accepted)
            self.num_draft_tokens += num_drafts
            self.num_accepted_tokens += num_accepted

    def note_step(self, seconds: float, plan: StepPlan) -> None:
        """One step of the engine took so long, from scheduling to its outputs."""
        if all(entry.num_tokens == 1 for entry in plan.sequences):
            self._row_cost.note(plan.num_tokens, seconds)

    def _drafts(
        self, item: ScheduledItem, step: StepBuilder, price: float, blocks: BlockManager
    ) -> list[int]:
        seq, end = item.seq, item.entry.start + 1
        state = _state(seq)
        # The draw after the last draft must still be one of the sequence's tokens.
        most = min(self._most, seq.max_total_tokens - end - 1, self._room(item))
        most = min(most, step.budget.chunk(end, most)) if most > 0 else 0
        most = _num_worth(state.acceptance, price, most)
        if most <= 0:
            state.fade()
            return []
        drafts = self._proposer.propose(state, seq.token_ids, end, most)
        if not blocks.grow_spare(seq, end + len(drafts)):
            del drafts[len(seq.block_table) * blocks.block_size - end :]
        return drafts

    def _room(self, item: ScheduledItem) -> int:
        """Bans hold for all draws of a step: drafts that outlast min_tokens wait for the next."""
        if not item.entry.banned_token_ids:
            return self._most
        return item.seq.state.request.sampling.min_tokens - item.entry.output_index - 1


def _state(seq: Sequence) -> DraftState:
    if seq.drafts is None:
        seq.drafts = DraftState()
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


def _num_worth(acceptance: float, price: float, most: int) -> int:
    """Drafts that are worth it: the i-th is right with acceptance ** i, and costs `price` tokens
    that the step would else have made in that time."""
    num, chance = 0, acceptance
    while num < most and chance > price:
        num += 1
        chance *= acceptance
    return num
