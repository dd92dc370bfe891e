"""One engine step: schedule, submit, result, update, outputs.

Owns scheduler, runner and output processor; single-threaded. Knows no asyncio and no tensors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

from torchweave_ray.config import CacheConfig, SchedulerConfig
from torchweave_ray.engine.adapters.pool import AdapterPool
from torchweave_ray.engine.admission import Admission, refuse_impossible
from torchweave_ray.engine.grammar import Constraints
from torchweave_ray.engine.memory.rest import Memory, Rest
from torchweave_ray.engine.memory.spill import BlockStore
from torchweave_ray.engine.output.counters import Counters
from torchweave_ray.engine.output.output_processor import OutputProcessor
from torchweave_ray.engine.plan import PendingStep, Runner, RuntimeLimits, StepPlan
from torchweave_ray.engine.scheduler import Scheduler
from torchweave_ray.engine.sequence import RequestState, SequenceUpdate
from torchweave_ray.engine.speculation.drafter import Drafter
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import FinishReason, GenerateRequest, RequestOutput, Stats
from torchweave_ray.tokenizer import Detokenizer
from torchweave_ray.tokenizer.grammar import GrammarCompiler


class Engine:
    def __init__(
        self,
        runner: Runner,
        detokenizer: Detokenizer,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        artifact_id: str = "",
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarCompiler | None = None,
        drafter: Drafter | None = None,
        adapters: AdapterPool | None = None,
        memory: Memory | None = None,
        store: BlockStore | None = None,
    ) -> None:
        """`clock` is that of deadlines; without `grammars` or `adapters` a request with one is
        refused; `memory`: what it lets go of when it sleeps; `store`: of cached blocks."""
        self._runner, self.check_health = runner, runner.check_health
        self._artifact_id = artifact_id
        self._clock = clock
        self.adapters = adapters or AdapterPool()
        limits = runner.limits
        self._scheduler = Scheduler(cache, scheduler, limits, clock, drafter, self.adapters, store)
        self.spill = self._scheduler.spill
        self.drafter = drafter
        self._holders: list[Runner | Drafter] = [runner] if drafter is None else [runner, drafter]
        self.admission = Admission(self._scheduler, limits)
        self._outputs = OutputProcessor(detokenizer, self._scheduler, clock)
        self._constraints = Constraints(grammars, limits)
        self._states: dict[str, RequestState] = {}
        self._pending: deque[PendingStep] = deque()
        self._ready: list[RequestOutput] = []  # of requests that ended between steps
        self._counters = Counters()
        self.rest = Rest(memory, self, self._scheduler.blocks)

    @property
    def limits(self) -> RuntimeLimits:
        return self._runner.limits

    @property
    def scheduler_config(self) -> SchedulerConfig:
        return self._scheduler.config

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._ready)

    def update_scheduler_config(self, config: SchedulerConfig) -> None:
        """Change limits between steps; what runs already is not cut short."""
        self._scheduler.config = config

    def warm_grammars(self) -> None:
        """Any thread may call."""
        self._constraints.warm()

    def check(self, request: GenerateRequest) -> None:
        """Refuse what can never be served. Any thread may call.

        Compiles a grammar that is new and looks for an adapter that is, which takes a while. Raises
        InvalidRequest naming the field, ModelNotFound for an adapter.
        """
        refuse_impossible(request, self.limits, self._artifact_id)
        self._constraints.check(request)
        self.adapters.check(request)

    def add(self, request: GenerateRequest, is_bounded: bool = False) -> None:
        """Queue a request; raises RequestError when it is refused.

        `is_bounded`: Overloaded when the backlog would grow beyond max_waiting_tokens.
        """
        self.check(request)
        self.rest.wake()
        if request.request_id in self._states:
            raise InvalidRequest(f"request id {request.request_id} is in use", "request_id")
        # Hashes cover the artifact, so that blocks of two models can never be taken for each other.
        adapter_id = self.adapters.check(request)
        request = replace(request, artifact_id=self._artifact_id, adapter_id=adapter_id)
        state = RequestState(request, self._clock())
        if is_bounded:
            self.admission.check_backlog(state)
        self._states[request.request_id] = state
        self._counters.num_prompt_tokens += len(request.prompt_token_ids)
        self._constraints.open(state)
        seq = self._scheduler.add(state)
        if not request.output_token_ids:
            return
        stop = seq.stop_of(len(seq.token_ids) - 1, self.limits.eos_token_ids)
        is_ended = stop is not None and stop[0] is FinishReason.STOP
        if self._outputs.resume(seq, is_ended):
            stop = FinishReason.STOP, None
        if stop is not None:
            self._scheduler.finish(seq, *stop)
            self._emit(self._outputs.process([SequenceUpdate(seq)]))

    def abort(self, request_id: str) -> None:
        """End a request now; one that is unknown or has ended is left alone."""
        self._end(request_id, FinishReason.ABORT, None)

    def step(self) -> list[RequestOutput]:
        """Advance by one step; the outputs of the oldest step in flight, if its turn has come."""
        started_at = self._clock()
        late = self.admission.late(self._states.values(), started_at)
        for request_id, why in chain(late, self.adapters.begin_step()):
            self._end(request_id, FinishReason.ERROR, why)
        self.spill.begin_step()
        plan = self._scheduler.schedule()
        self.forget_released()
        if plan is not None:
            if self._constraints:
                plan = self._constrained(plan)
            self._counters.num_computed_tokens += plan.num_tokens
            self._pending.append(self._runner.submit(plan))
        elif not self._pending:
            self.adapters.wait()
            self.spill.wait()
        if self._pending and (plan is None or len(self._pending) > self.limits.step_depth):
            outputs = self._outputs.process(
                self._scheduler.update(self._pending.popleft().result())
            )
            self._counters.note_outputs(outputs)
            self._emit(outputs)
        seconds = self._clock() - started_at
        self.admission.note_step(seconds, plan)
        if self.drafter is not None and plan is not None:
            self.drafter.note_step(seconds, plan)
        ready, self._ready = self._ready, []
        return ready

    def stats(self) -> Stats:
        return self._counters.stats(self._scheduler, self.rest)

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and for an idle engine."""
        self._scheduler.check_integrity()
        assert self._scheduler.has_work or not self._states, "a request was forgotten"

    def close(self) -> None:
        for each in (self.adapters, self.spill, *self._holders):
            each.close()

    def forget_released(self) -> None:
        for seq_id in self._scheduler.released:
            for each in self._holders:
                each.release(seq_id)
        self._scheduler.released.clear()

    def _constrained(self, plan: StepPlan) -> StepPlan:
        """The plan with its bitmask; a sequence whose grammar cannot go on ends here."""
        plan, failed = self._constraints.apply(plan)
        for seq, why in failed:
            self._scheduler.finish(seq, FinishReason.ERROR, error=why)
            self._emit(self._outputs.process([SequenceUpdate(seq)]))
        return plan

    def _end(self, request_id: str, reason: FinishReason, error: str | None) -> None:
        state = self._states.get(request_id)
        if state is None:
            return
        alive = [seq for seq in state.sequences if not seq.is_finished]
        self.admission.forget_hits()  # a fork may have lost what it was made from
        for seq in alive:
            self._scheduler.finish(seq, reason, error=error)
        self._emit(self._outputs.process(SequenceUpdate(seq) for seq in alive))

    def _emit(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.is_last:
                self.adapters.release(self._states.pop(output.request_id).request)
                self._constraints.close(output.request_id)
                self._counters.note_end(output)
        self._ready += outputs
