"""What a step's result does to its sequences: tokens, blocks published, who has ended.

Leaving goes through the scheduler's one door, `finish`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torchweave_ray.engine.plan import IN_FLIGHT, ScheduledSequence, StepOutput, StepResult
from torchweave_ray.engine.sequence import RequestState, SequenceUpdate
from torchweave_ray.engine.step_builder import ScheduledItem
from torchweave_ray.outputs import FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from torchweave_ray.engine.scheduler import Scheduler


def apply_result(
    scheduler: Scheduler, items: Iterable[ScheduledItem], result: StepResult
) -> list[SequenceUpdate]:
    updates: list[SequenceUpdate] = []
    for row, item in enumerate(items):
        seq, entry = item.seq, item.entry
        if seq.is_finished:
            continue
        failure = result.failed.get(seq.seq_id)
        if failure is not None:
            scheduler.finish(seq, FinishReason.ERROR, error=failure)
            updates.append(SequenceUpdate(seq))
            continue
        if seq.epoch == item.epoch:
            scheduler.blocks.commit(seq, entry.start, entry.start + entry.num_tokens)
        if entry.output is StepOutput.PROMPT_LOGPROBS:
            _add_prompt_logprobs(seq.state, entry.start, result.prompt_logprobs[seq.seq_id])
        elif entry.output in (StepOutput.POOL, StepOutput.POOL_ALL):
            if _add_pooled(seq.state, entry, result.pooled[seq.seq_id]):
                scheduler.finish(seq, FinishReason.STOP)
                updates.append(SequenceUpdate(seq))
        elif entry.output is StepOutput.SAMPLE:
            updates.append(_append(scheduler, item, result, row))
    return updates


def _add_pooled(state: RequestState, entry: ScheduledSequence, values: Iterable[float]) -> bool:
    """Note what one chunk's positions gave; True when it was the prompt's last."""
    end, num_prompt = entry.start + entry.num_tokens, entry.num_prompt_tokens
    if entry.output is StepOutput.POOL_ALL:
        values = [value / num_prompt for value in values]
        if state.pooled is not None and entry.start > 0:  # from 0: it begins anew
            values = [old + new for old, new in zip(state.pooled, values, strict=True)]
    state.pooled = tuple(values)
    return end == num_prompt


def _add_prompt_logprobs(
    state: RequestState, start: int, logprobs: Iterable[TokenLogprobs]
) -> None:
    """Those of the tokens after positions `start`..; ones known already are dropped."""
    for position, entry in enumerate(logprobs, start + 1):
        if position == len(state.prompt_logprobs):
            state.prompt_logprobs.append(entry)


def _append(
    scheduler: Scheduler, item: ScheduledItem, result: StepResult, row: int
) -> SequenceUpdate:
    """The tokens drawn: one, and one more for each draft that was right."""
    seq, tokens = item.seq, result.token_ids[row]
    position = item.entry.start + item.entry.num_tokens
    assert seq.token_ids[position] == IN_FLIGHT
    seq.token_ids[position : position + 1] = tokens
    num_drafts = len(item.entry.draft_token_ids)
    if num_drafts and scheduler.drafter is not None:
        seq.num_computed_tokens += len(tokens) - 1
        scheduler.blocks.commit(seq, position, seq.num_computed_tokens)
        scheduler.drafter.note(seq, num_drafts, len(tokens) - 1)
    state = seq.state
    while len(state.sequences) < state.request.n:  # the first choice's first token
        scheduler.add(state, fork_source=seq)
    num = 0
    while num < len(tokens) and not seq.is_finished:
        stop = seq.stop_of(position + num, scheduler.limits.eos_token_ids)
        num += 1
        if stop is not None:
            del seq.token_ids[position + num :]
            scheduler.finish(seq, *stop)
    logprobs = result.logprobs[row] if result.logprobs else None
    kept = None if logprobs is None else tuple(logprobs[:num])
    return SequenceUpdate(seq, tuple(tokens[:num]), kept)
