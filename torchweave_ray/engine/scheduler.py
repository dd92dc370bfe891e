"""Who runs in a step, who waits, who leaves. There is no prefill phase.

Every sequence has `num_computed_tokens`; a step lets it catch up with `token_ids`. Decodes go
first, one token each; what is left of the budget goes to prompts, shortest remaining first with
ageing. A sequence leaves through one door, `finish`. Knows no text and no tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torchweave_ray.config import CacheConfig, SchedulerConfig
from torchweave_ray.engine.adapters.pool import AdapterPool
from torchweave_ray.engine.block_manager import BlockManager
from torchweave_ray.engine.budget import StepBudget
from torchweave_ray.engine.fairness import FairShares
from torchweave_ray.engine.memory.spill import BlockStore, Spill
from torchweave_ray.engine.output.results import apply_result
from torchweave_ray.engine.plan import RuntimeLimits, StepPlan, StepResult
from torchweave_ray.engine.sequence import RequestState, Sequence, SequenceStatus, SequenceUpdate
from torchweave_ray.engine.speculation.drafter import Drafter
from torchweave_ray.engine.step_builder import ScheduledItem, StepBuilder
from torchweave_ray.engine.waiting_queue import WaitingQueue
from torchweave_ray.outputs import FinishReason, OutputKind


class Scheduler:
    def __init__(
        self,
        cache: CacheConfig,
        config: SchedulerConfig,
        limits: RuntimeLimits,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
        adapters: AdapterPool | None = None,
        store: BlockStore | None = None,
    ) -> None:
        """`clock` gives seconds; a `drafter` is for steps of which none is in flight."""
        self.config = config
        """May be replaced between steps: limits that change in place."""
        self.blocks = BlockManager(limits, cache)
        self.spill = Spill(store, self.blocks, clock)
        self.num_steps = 0
        """Steps scheduled so far; the last one's number."""
        self.num_preemptions = self.num_hit_tokens = 0
        self.num_query_tokens = 0
        """Prompt tokens that were looked up in the prefix cache."""
        self.released: list[int] = []
        """seq_ids that the runner may forget; the engine empties it."""
        self.limits = limits
        self._clock = clock
        self._adapters = adapters or AdapterPool()
        self.drafter = drafter if limits.step_depth == 0 else None
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue(config.ageing_tokens_per_step)
        self.shares = FairShares()
        self._exclusive: deque[Sequence] = deque()  # only the first may be running
        self._last_was_exclusive = False
        self._steps: deque[tuple[int, list[ScheduledItem]]] = deque()  # submitted, no result yet
        self._num_sequences = 0

    # Arrivals and leaving.

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self._waiting_exclusive())

    @property
    def num_waiting_tokens(self) -> int:
        """The backlog: tokens that prompts, waiting or begun, still have to compute."""
        others = [*self.running, *self._waiting_exclusive()]
        return self.waiting.num_tokens + sum(seq.num_missing_tokens for seq in others)

    def num_waiting_tokens_of(self, tenant: str) -> int:
        own = (*self.running, *self._waiting_exclusive(), *self.waiting.of(tenant))
        return sum(s.num_missing_tokens for s in own if s.state.request.tenant == tenant)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self._exclusive or self._steps)

    def add(self, state: RequestState, fork_source: Sequence | None = None) -> Sequence:
        """Queue the next choice of a request."""
        request = state.request
        wanted = request.sampling.max_tokens or self.limits.max_model_len
        total = min(len(request.prompt_token_ids) + wanted, self.limits.max_model_len)
        if request.output_kind is OutputKind.POOLED:
            total = len(request.prompt_token_ids) + 1
        seq_id = self._num_sequences
        self._num_sequences += 1
        seq = Sequence(seq_id, state, len(state.sequences), total, self.num_steps)
        seq.fork_source = fork_source
        state.sequences.append(seq)
        self.shares.join(seq)
        self._enqueue(seq)
        return seq

    def finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        """The one exit door; finishing twice does nothing."""
        if seq.is_finished:
            return
        self._leave_queue(seq)
        if seq.state.request.exclusive:
            self._exclusive.remove(seq)
        self._release(seq)
        self.shares.leave(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason, seq.error = reason, stop_reason, error
        seq.fork_source = None
        if seq.has_token_in_flight:
            seq.token_ids.pop()

    def check_integrity(self) -> None:
        """Every invariant of queues and blocks; property tests call it after each step."""
        self.waiting.check_integrity()
        for seq in self.running:
            assert seq.num_computed_tokens <= len(seq.token_ids)
            assert self.blocks.num_positions(seq) >= seq.num_computed_tokens
        assert len(self.running) <= self.config.max_num_seqs
        self.blocks.check_integrity(self.running)

    # One step.

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run now."""
        step = StepBuilder(StepBudget(self.config, self.limits.block_size), self.limits)
        if self._exclusive and not self._last_was_exclusive:
            self._schedule_exclusive(step)
        self._last_was_exclusive = bool(step.items)
        if not step.items:
            self._schedule_batch(step)
        if not step.items and self._exclusive:
            self._schedule_exclusive(step)
            self._last_was_exclusive = True
        if not step.items:
            return None
        if self.drafter is not None:
            self.drafter.add_drafts(step, self.blocks)
        self.num_steps += 1
        for item in step.items:
            item.seq.last_step = self.num_steps
            item.seq.num_submitted_tokens = item.seq.num_computed_tokens
        self._steps.append((self.num_steps, step.items))
        return step.plan()

    def update(self, result: StepResult) -> list[SequenceUpdate]:
        """Apply the oldest submitted step; what it says of finished sequences is dropped."""
        number, items = self._steps.popleft()
        updates = apply_result(self, items, result)
        self.blocks.pass_fence(number)
        return updates

    # Inside a step.

    def _schedule_batch(self, step: StepBuilder) -> None:
        self.shares.make_room(self)
        batch = [s for s in self.running if not s.state.request.exclusive]
        decodes = [s for s in batch if s.num_remaining_tokens == 1 and not s.is_full]
        for seq in sorted(decodes, key=lambda s: s.seniority):
            if seq.status is SequenceStatus.RUNNING:  # else preempted by one before it
                self._schedule_chunk(seq, step)
        prompts = [s for s in batch if not s.is_waiting and s.num_remaining_tokens > 1]
        is_admitting = True
        for seq in self.shares.order(prompts, self.waiting):
            if step.budget.is_spent:
                return
            if seq.status is SequenceStatus.RUNNING:
                self._schedule_chunk(seq, step)
            elif is_admitting:
                is_admitting = self._admit(seq, step)

    def _schedule_exclusive(self, step: StepBuilder) -> None:
        seq = self._exclusive[0]
        if seq.status is SequenceStatus.WAITING:
            self._admit(seq, step)
        elif not seq.is_full:
            self._schedule_chunk(seq, step)

    def _admit(self, seq: Sequence, step: StepBuilder) -> bool:
        """Let a waiting sequence in, or return False: then none behind it is tried either."""
        if seq.has_token_in_flight:
            return True  # preempted a moment ago; its last token is not known yet
        if not (self._adapters.admit(seq.state.request) and self.spill.admit(seq)):
            return True  # others need not wait for its adapter, or its blocks from the disk
        if len(self.running) >= self.config.max_num_seqs:
            return False
        prefix = self.blocks.shared_prefix(seq)
        needed = self.blocks.num_blocks_taken(prefix, len(seq.token_ids))
        if needed > self.blocks.num_admissible_blocks(self.running):
            return False
        start = prefix.num_blocks * self.limits.block_size
        if not step.budget.chunk(start, len(seq.token_ids) - start):
            return False
        self._leave_queue(seq)
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)
        step.copies += self.blocks.share(seq, prefix)
        self._note_admission(seq, start)
        self._schedule_chunk(seq, step)
        return True

    def _note_admission(self, seq: Sequence, num_cached_tokens: int) -> None:
        state = seq.state
        if state.first_scheduled_s is None:
            state.first_scheduled_s = self._clock()
            state.num_cached_tokens = min(num_cached_tokens, seq.num_prompt_tokens)
            self.num_query_tokens += seq.num_prompt_tokens
            self.num_hit_tokens += state.num_cached_tokens

    def _schedule_chunk(self, seq: Sequence, step: StepBuilder) -> None:
        """Put the next tokens of a running sequence into the step, if memory can be had."""
        end = step.chunk_end(seq)
        if end > seq.num_computed_tokens and self._grow(seq, end, step):
            self.shares.charge(seq, end)
            step.add(seq, end)

    # Memory.

    def _grow(self, seq: Sequence, num_tokens: int, step: StepBuilder) -> bool:
        """Blocks for `num_tokens`, preempting the most junior sequences not in the step yet."""
        while not self.blocks.grow(seq, num_tokens):
            missing = self.blocks.num_missing(seq, num_tokens)
            if self.blocks.num_free_blocks + self.blocks.num_fenced_blocks >= missing:
                return False  # they come free when the step in flight is done
            victims = [s for s in self.running if s.seq_id not in step.seq_ids]
            victim = max(victims, key=lambda s: s.seniority)
            if victim is seq and seq.num_remaining_tokens > 1:
                return False  # a prompt keeps what it has and waits for its seniors
            self.preempt(victim)
            if victim is seq:
                return False
        return True

    def preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.status = SequenceStatus.WAITING
        seq.epoch += 1
        self.num_preemptions += 1
        self._enqueue(seq)

    def _release(self, seq: Sequence) -> None:
        is_in_flight = bool(self._steps) and seq.last_step >= self._steps[0][0]
        self.blocks.release(seq, seq.last_step if is_in_flight else None)
        self.released.append(seq.seq_id)

    def _enqueue(self, seq: Sequence) -> None:
        if not seq.state.request.exclusive:
            self.waiting.add(seq, self.blocks.num_shared_tokens(seq))
        elif seq not in self._exclusive:
            self._exclusive.append(seq)

    def _leave_queue(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
        elif not seq.state.request.exclusive:
            self.waiting.remove(seq)

    def _waiting_exclusive(self) -> list[Sequence]:
        return [s for s in list(self._exclusive) if s.status is SequenceStatus.WAITING]
