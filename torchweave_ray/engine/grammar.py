"""Which token may come next in sequences whose text a grammar constrains: the bitmask of a step.

A matcher a sequence, caught up with its tokens when a step draws for it; so resumed tokens,
preemption and forks are one rule. Knows nothing of schedules; no cost while nobody has a grammar.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torchweave_ray.engine.plan import RuntimeLimits, ScheduledSequence, StepOutput, StepPlan
from torchweave_ray.engine.sequence import RequestState, Sequence
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import GenerateRequest, OutputKind
from torchweave_ray.tokenizer.grammar import GrammarCompiler

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_MASK_S = 0.1
"""CPU time of one mask: the step of all others waits for it."""
_NICE = 10


class _Matcher:
    """One sequence's place in its grammar."""

    __slots__ = ("_matcher", "_num_consumed")

    def __init__(self, start: LLMatcher) -> None:
        self._matcher = start.deep_copy()
        self._num_consumed = 0

    def catch_up(self, entry: ScheduledSequence) -> str | None:
        """Consume what the output gained; why not, if the grammar has no such text."""
        first = entry.num_prompt_tokens + self._num_consumed
        for token_id in entry.token_ids[first : entry.start + entry.num_tokens]:
            self._num_consumed += 1
            if not self.is_over and not self._matcher.consume_token(token_id):
                return f"the text left its grammar: {self._matcher.get_error()}"
        return None

    def fill(self, row: NDArray[np.int32]) -> str | None:
        """Write the allowed tokens into a row of the bitmask; why not, if that fails."""
        start = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            return f"the grammar cannot go on: {self._matcher.get_error()}"
        if time.thread_time() - start > MAX_MASK_S:
            return f"the grammar takes more than {MAX_MASK_S:g} s a token"
        return None

    def fill_behind(
        self, drafts: tuple[int, ...], rows: NDArray[np.int32], ends: NDArray[np.int32]
    ) -> int:
        """How many of these drafts the grammar has next; into `rows`, what may follow each."""
        num = 0
        for token_id in drafts[: self._matcher.validate_tokens(list(drafts))]:
            self._matcher.consume_token(token_id)
            num += 1
            if self.is_over:
                rows[num - 1] = ends
                break
            if self.fill(rows[num - 1]) is not None:
                num -= 1  # said when it is the next draw
                self._matcher.rollback(1)
                break
        self._matcher.rollback(num)
        return num

    @property
    def is_over(self) -> bool:
        """Only end tokens may follow, any number: the matcher takes part no more."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class _Constrained:
    """A request with a grammar and the matchers of its choices."""

    __slots__ = ("matchers", "start", "state")

    def __init__(self, state: RequestState, start: LLMatcher) -> None:
        self.state = state
        self.start = start
        self.matchers: dict[int, _Matcher] = {}
        """By seq_id; made when the choice draws its first token."""


class Constraints:
    def __init__(self, compiler: GrammarCompiler | None, limits: RuntimeLimits) -> None:
        self._compiler = compiler
        self._ends = np.zeros(-(-limits.vocab_size // 32), dtype=np.int32)
        """A row of a bitmask that allows the end tokens."""
        for token_id in limits.eos_token_ids:
            self._ends.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._requests: dict[str, _Constrained] = {}

    def __bool__(self) -> bool:
        return bool(self._requests)

    def warm(self) -> None:
        """Have ready what the first grammar needs, where nobody waits for it yet."""
        if self._compiler is not None:
            with contextlib.suppress(InvalidRequest):  # each request is told
                self._compiler.warm()

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest. Compiles: any thread may call, best none that others wait for."""
        if request.grammar is not None:
            if request.output_kind is OutputKind.POOLED:
                raise InvalidRequest("a grammar needs output tokens", "grammar")
            self._compile(request.grammar)

    def open(self, state: RequestState) -> None:
        """Constrain a request that was checked; does nothing without a grammar."""
        if state.request.grammar is not None:
            start = self._compile(state.request.grammar)
            self._requests[state.request.request_id] = _Constrained(state, start)

    def close(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def apply(self, plan: StepPlan) -> tuple[StepPlan, list[tuple[Sequence, str]]]:
        """The plan with its bitmask, and the sequences that cannot go on, with the reason."""
        seqs = {seq.seq_id: (c, seq) for c in self._requests.values() for seq in c.state.sequences}
        bitmask = None
        entries = list(plan.sequences)
        failed = []
        behind: dict[int, NDArray[np.int32]] = {}
        for row, entry in enumerate(entries):
            if entry.seq_id not in seqs or entry.output is not StepOutput.SAMPLE:
                continue
            if bitmask is None:
                bitmask = np.full((len(entries), len(self._ends)), -1, dtype=np.int32)
            constrained, seq = seqs[entry.seq_id]
            drafts, entries[row] = entry.draft_token_ids, replace(entry, draft_token_ids=())
            matcher = constrained.matchers.get(entry.seq_id)
            if matcher is None:
                matcher = constrained.matchers[entry.seq_id] = _Matcher(constrained.start)
            why = matcher.catch_up(entry)
            if why is None and matcher.is_over:
                bitmask[row] = self._ends
            elif why is None:
                why = matcher.fill(bitmask[row])
            if why is not None:
                bitmask[row] = -1
                failed.append((seq, why))
            elif entry.banned_token_ids and not (bitmask[row] & ~self._ends).any():
                # min_tokens bans end tokens, but nothing else may come: it is filled up with them.
                entries[row] = replace(entries[row], banned_token_ids=())
            elif drafts and not (matcher.is_over or entry.banned_token_ids):
                rows = np.empty((len(drafts), len(self._ends)), dtype=np.int32)
                num = matcher.fill_behind(drafts, rows, self._ends)
                entries[row] = replace(entry, draft_token_ids=drafts[:num])
                behind[row] = rows[:num]
        if bitmask is None:
            return plan, failed
        sequences = tuple(entries)
        return replace(plan, sequences=sequences, bitmask=bitmask, draft_bitmasks=behind), failed

    def _compile(self, grammar: str) -> LLMatcher:
        if self._compiler is None:
            raise InvalidRequest("structured output is not available here", "grammar")
        return self._compiler.compile(grammar)


def polite_thread() -> ThreadPoolExecutor:
    """One thread to compile in, which gives way to those of the model (where Linux can)."""

    def give_way() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)

    return ThreadPoolExecutor(1, "grammar", initializer=give_way)
