"""One step being put together: which tokens of which sequence, and what comes back of them."""

from __future__ import annotations

from dataclasses import dataclass

from torchweave_ray.engine.budget import StepBudget
from torchweave_ray.engine.plan import (
    IN_FLIGHT,
    RuntimeLimits,
    ScheduledSequence,
    StepOutput,
    StepPlan,
)
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.outputs import OutputKind, Pooling


@dataclass(frozen=True, slots=True)
class ScheduledItem:
    """A sequence in a submitted step, as it was when it was scheduled."""

    seq: Sequence
    epoch: int
    entry: ScheduledSequence


class StepBuilder:
    def __init__(self, budget: StepBudget, limits: RuntimeLimits) -> None:
        self.budget = budget
        self.items: list[ScheduledItem] = []
        self.seq_ids: set[int] = set()
        self.copies: list[tuple[int, int]] = []
        self._limits = limits

    def chunk_end(self, seq: Sequence) -> int:
        """How far the sequence may get in this step; its present end when there is no budget."""
        start = seq.num_computed_tokens
        if seq.num_remaining_tokens == 1:
            return start + 1
        wanted = min(seq.num_remaining_tokens, self._limits.groups.max_chunk)
        end = start + self.budget.chunk(start, wanted)
        if seq.state.request.output_kind is OutputKind.PROMPT_LOGPROBS:
            last = seq.num_prompt_tokens - 1
            if start < last:  # the last prompt token goes alone: it samples
                return min(end, last)
        return end

    def add(self, seq: Sequence, end: int) -> None:
        """Schedule positions up to `end`; the sequence's table holds them already."""
        start = seq.num_computed_tokens
        if seq.num_remaining_tokens == 1:
            self.budget.take_decode(start)
        else:
            self.budget.take_chunk(start, end - start)
        output = self._output(seq, end)
        entry = ScheduledSequence(
            seq_id=seq.seq_id,
            start=start,
            num_tokens=end - start,
            token_ids=seq.token_ids,
            num_prompt_tokens=seq.num_prompt_tokens,
            block_tables=seq.block_tables,
            sampling=seq.state.request.sampling,
            seed=seq.seed,
            output=output,
            banned_token_ids=self._banned(seq, end),
            adapter_id=seq.state.request.adapter_id,
        )
        self.items.append(ScheduledItem(seq, seq.epoch, entry))
        self.seq_ids.add(seq.seq_id)
        seq.num_computed_tokens = end
        if output is StepOutput.SAMPLE:
            seq.token_ids.append(IN_FLIGHT)

    def plan(self) -> StepPlan:
        return StepPlan(tuple(item.entry for item in self.items), tuple(self.copies))

    def _output(self, seq: Sequence, end: int) -> StepOutput:
        request = seq.state.request
        kind = request.output_kind
        if kind is OutputKind.POOLED and request.pooling is Pooling.MEAN:
            return StepOutput.POOL_ALL
        if end < len(seq.token_ids):
            needed = kind is OutputKind.PROMPT_LOGPROBS and seq.state.needs_prompt_logprobs
            return StepOutput.PROMPT_LOGPROBS if needed else StepOutput.NONE
        return StepOutput.POOL if kind is OutputKind.POOLED else StepOutput.SAMPLE

    def _banned(self, seq: Sequence, end: int) -> tuple[int, ...]:
        """End tokens, as long as the drawn token's index is below min_tokens."""
        sampling = seq.state.request.sampling
        if end - seq.num_prompt_tokens >= sampling.min_tokens:
            return ()
        return (*self._limits.eos_token_ids, *sampling.stop_token_ids)
