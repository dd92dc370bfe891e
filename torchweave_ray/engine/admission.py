"""What may join the queue, when to come again, and who can no longer make it in time.

Counts the backlog exactly, in tokens that prompts still have to compute. Decides nothing of who
runs, and ends nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torchweave_ray.deadline import Late
from torchweave_ray.engine.budget import least_prefill_s, prompt_tokens_per_s
from torchweave_ray.engine.plan import RuntimeLimits, StepPlan
from torchweave_ray.engine.scheduler import Scheduler
from torchweave_ray.engine.sequence import RequestState, Sequence
from torchweave_ray.errors import DeadlineExceeded, InvalidRequest, Overloaded, RequestError
from torchweave_ray.outputs import GenerateRequest, OutputKind, RequestOutput

MAX_CHOICES = 64
PREDICTION_MARGIN = 0.8
"""A prompt is given up only if this share of its predicted time is still too long."""
_LEAST_WAIT_S = 0.25
"""Sooner nobody is asked to come again: that would be a busy loop."""
_MEMORY_S = 5.0
_ENOUGH_S = 0.5
"""Of steps with prompts, before their pace is trusted."""


def refuse_impossible(request: GenerateRequest, limits: RuntimeLimits, artifact_id: str) -> None:
    """Raises InvalidRequest naming the field, for what can never be served."""
    if request.artifact_id and request.artifact_id != artifact_id:
        raise InvalidRequest(
            f"this replica serves artifact {artifact_id}, not {request.artifact_id}",
            "artifact_id",
        )
    if not 1 <= request.n <= MAX_CHOICES:
        raise InvalidRequest(f"n must be between 1 and {MAX_CHOICES}", "n")
    request.sampling.validate(limits.vocab_size)
    _check_length(request, limits.max_model_len)
    is_pooled = request.output_kind is OutputKind.POOLED
    if request.n > 1 and (request.exclusive or is_pooled or request.output_token_ids):
        raise InvalidRequest("n must be 1 for an exclusive, resumed or pooled request", "n")
    for name in ("prompt_token_ids", "output_token_ids"):
        for token_id in getattr(request, name):
            if not 0 <= token_id < limits.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary of {limits.vocab_size}",
                    name,
                )


def _check_length(request: GenerateRequest, longest: int) -> None:
    num_prompt = len(request.prompt_token_ids)
    if not num_prompt:
        raise InvalidRequest("the prompt is empty", "prompt")
    if request.output_kind is OutputKind.POOLED:
        needed = num_prompt
    else:
        needed = num_prompt + (request.sampling.max_tokens or 1)
    if needed > longest:
        raise InvalidRequest(
            f"the context length is {longest} tokens, but the prompt has {num_prompt} "
            f"and {needed - num_prompt} more were asked for",
            "max_tokens" if num_prompt < longest else "prompt",
            "context_length_exceeded",
        )


def refusal_of(output: RequestOutput) -> DeadlineExceeded | None:
    """Instead of the last output of a request that never came to its first token in time."""
    if output.usage is None or output.usage.completion_tokens:
        return None
    error = next((delta.error for delta in output.deltas if delta.error in set(Late)), None)
    return None if error is None else DeadlineExceeded(error, None, "deadline_exceeded")


class PromptPace:
    """Prompt tokens a second beside the decodes there are, and while prompts wait for decodes to
    end; the last seconds count most."""

    def __init__(self) -> None:
        self._seconds = self._num_tokens = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        return self._num_tokens / self._seconds if self._seconds >= _ENOUGH_S else None

    def note(self, seconds: float, num_tokens: int, is_waiting: bool = False) -> None:
        """One step took so long and computed so many tokens of prompts; `is_waiting`: more wait."""
        if (num_tokens or is_waiting) and seconds > 0:
            kept = math.exp(-seconds / _MEMORY_S)
            self._seconds = self._seconds * kept + seconds
            self._num_tokens = self._num_tokens * kept + num_tokens


@dataclass(frozen=True, slots=True)
class Coming:
    """Let in by a look, and not in the queue yet."""

    num_seqs: int = 0
    num_tokens: int = 0


class Admission:
    def __init__(self, scheduler: Scheduler, limits: RuntimeLimits) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._pace = PromptPace()
        self._hits_are_fresh = False
        self._let_in = self._arrived = Coming()
        """All so far: the loop's thread alone writes the first, the engine's the second."""

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Measured, or predicted until enough is; None: nothing is known."""
        scheduler = self._scheduler
        decodes = [s.num_computed_tokens for s in scheduler.running if s.num_remaining_tokens == 1]
        measured = self._pace.tokens_per_s
        return measured or prompt_tokens_per_s(scheduler.config, decodes)

    def backlog(self) -> int:
        """Tokens that prompts still have to compute, counted anew with what the cache has now."""
        if not self._hits_are_fresh:
            self._hits_are_fresh = True
            waiting, blocks = self._scheduler.waiting, self._scheduler.blocks
            for seq in waiting:
                waiting.note_shared(seq, blocks.num_shared_tokens(seq))
        return self._scheduler.num_waiting_tokens

    def look(self, request: GenerateRequest, on_refusal: Callable[[RequestError], None]) -> Coming:
        """`check_backlog` from another thread while a step runs, which may take longer than a
        refusal should. Raises Overloaded, which `on_refusal` hears of first.

        It only looks: counts are those of the step's end, for what a step computes is taken off
        when it is planned, and of all that was let in before. Where that is not enough to be sure,
        the engine's thread will say. What is returned is for `note_arrival`.
        """
        scheduler, coming = self._scheduler, Coming()
        try:
            is_sure = scheduler.shares.share(request.tenant, request.weight) == 1.0
            if is_sure and not request.adapter and request.artifact_id:
                before = Coming(
                    self._let_in.num_seqs - self._arrived.num_seqs,
                    self._let_in.num_tokens - self._arrived.num_tokens,
                )
                state = RequestState(request, 0.0)
                wanted = self._check(state, lambda: scheduler.num_waiting_tokens, before)
                coming = Coming(1, wanted)
        except Overloaded as error:
            on_refusal(error)
            raise
        except RuntimeError:  # something changed while it was looked through
            pass
        self._let_in = _sum(self._let_in, coming)
        return coming

    def note_arrival(self, coming: Coming) -> None:
        """It is about to join the queue, or to be refused."""
        self._arrived = _sum(self._arrived, coming)

    def check_backlog(self, state: RequestState) -> None:
        """Raises Overloaded when a new request would take the backlog over its limit.

        An empty backlog takes any request, and a stream that goes on here was taken elsewhere
        already. A tenant within its share of a full backlog is let in all the same: who floods it
        shuts himself out. The cache is asked only when it could matter.
        """
        self._check(state, self.backlog, Coming())

    def _check(self, state: RequestState, count: Callable[[], int], coming: Coming) -> int:
        """Tokens that it adds to the backlog; `coming` will be there before it."""
        scheduler = self._scheduler
        self._check_length(state, coming)
        limit = scheduler.config.max_waiting_tokens
        probe = Sequence(-1, state, 0, 0, scheduler.num_steps)
        known_hits = scheduler.waiting.num_remaining_tokens - scheduler.waiting.num_tokens
        most = scheduler.num_waiting_tokens + known_hits + probe.num_remaining_tokens
        if most + coming.num_tokens <= limit or state.request.output_token_ids:
            return probe.num_remaining_tokens
        probe.num_shared_tokens = scheduler.blocks.num_shared_tokens(probe)
        backlog, wanted = count() + coming.num_tokens, probe.num_missing_tokens
        if backlog and backlog + wanted > limit and not self._is_within_share(probe, limit):
            raise Overloaded(
                f"{backlog} prompt tokens are waiting, this request adds {wanted}, "
                f"and the limit is {limit}",
                None,
                "queue_full",
                self._seconds_for(min(backlog, backlog + wanted - limit)),
            )
        return wanted

    def _check_length(self, state: RequestState, coming: Coming) -> None:
        """The same for the number of sequences that wait."""
        scheduler, request = self._scheduler, state.request
        num_waiting = scheduler.num_waiting + coming.num_seqs
        limit = scheduler.config.max_waiting_seqs
        if num_waiting < limit or request.output_token_ids:
            return
        share = scheduler.shares.share(request.tenant, request.weight)
        if share < 1.0 and len(scheduler.waiting.of(request.tenant)) < share * limit:
            return
        raise Overloaded(
            f"{num_waiting} sequences are waiting, and the limit is {limit}",
            None,
            "queue_full",
            self._seconds_for((scheduler.num_waiting_tokens + coming.num_tokens) // num_waiting),
        )

    def _is_within_share(self, probe: Sequence, limit: int) -> bool:
        scheduler, request = self._scheduler, probe.state.request
        share = scheduler.shares.share(request.tenant, request.weight)
        if share == 1.0:
            return False
        own = scheduler.num_waiting_tokens_of(request.tenant)
        return not own or own + probe.num_missing_tokens <= share * limit

    def forget_hits(self) -> None:
        """What is shared has changed, as it does in every step; see `backlog`."""
        self._hits_are_fresh = False

    def note_step(self, seconds: float, plan: StepPlan | None) -> None:
        """One step of the engine took so long."""
        self.forget_hits()
        scheduler = self._scheduler
        if 2 * scheduler.num_waiting_tokens > scheduler.config.max_waiting_tokens:
            self.backlog()  # for those who only look
        if plan is not None:
            chunks = (entry.num_tokens for entry in plan.sequences if entry.num_tokens > 1)
            is_waiting = scheduler.num_waiting > 0
            self._pace.note(seconds, sum(chunks), is_waiting)

    def late(self, states: Iterable[RequestState], now: float) -> Iterator[tuple[str, Late]]:
        """Ids of requests whose deadline has passed, or will have when their prompt is computed.
        They may be ended meanwhile."""
        for state in [state for state in states if state.request.deadline is not None]:
            why = self._lateness(state, now)
            if why is not None:
                yield state.request.request_id, why

    def _lateness(self, state: RequestState, now: float) -> Late | None:
        deadline = state.request.deadline
        assert deadline is not None
        if deadline <= now:
            return Late.PASSED
        if state.first_token_s is not None:
            return None
        first, left_s = state.sequences[0], deadline - now
        if self._least_prefill_s(first) <= left_s:
            return None
        self.backlog()  # the cache may have more of it by now
        return Late.HOPELESS if self._least_prefill_s(first) > left_s else None

    def _least_prefill_s(self, seq: Sequence) -> float:
        """Optimistic: alone, and with what a step in flight computes for another taken as done."""
        config = self._scheduler.config
        in_flight = self._limits.step_depth * config.step_tokens
        start = seq.num_computed_tokens + seq.num_shared_tokens
        num_tokens = seq.num_missing_tokens - in_flight
        return PREDICTION_MARGIN * least_prefill_s(config, start, num_tokens)

    def _seconds_for(self, num_tokens: int) -> float:
        """Until so many tokens of the backlog are computed; 1 while nobody knows."""
        rate = self.prompt_tokens_per_s
        return max(_LEAST_WAIT_S, num_tokens / rate) if rate else 1.0


def _sum(one: Coming, other: Coming) -> Coming:
    return Coming(one.num_seqs + other.num_seqs, one.num_tokens + other.num_tokens)
