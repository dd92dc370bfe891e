"""A request's life in the engine, and that of each of its token streams.

Only data and the questions one may ask of it; who runs and who leaves is the scheduler's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchweave_ray.block_hash import BlockHash, root_hash
from torchweave_ray.engine.plan import IN_FLIGHT
from torchweave_ray.outputs import FinishReason, GenerateRequest, TokenLogprobs

if TYPE_CHECKING:
    from torchweave_ray.engine.speculation.costs import Acceptance


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class RequestState:
    """What all sequences of one request share."""

    __slots__ = (
        "arrival_s",
        "first_scheduled_s",
        "first_token_s",
        "num_cached_tokens",
        "pooled",
        "prompt_logprobs",
        "request",
        "sequences",
    )

    def __init__(self, request: GenerateRequest, arrival_s: float) -> None:
        self.request = request
        self.arrival_s = arrival_s
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.num_cached_tokens = 0
        self.sequences: list[Sequence] = []
        """Choices in order; all but the first appear when the first has computed the prompt."""
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        """Of prompt tokens so far; the first token has none."""
        self.pooled: tuple[float, ...] | None = None

    @property
    def is_finished(self) -> bool:
        """Choices beyond the first exist from its first token on; if that never came, none will."""
        return all(seq.is_finished for seq in self.sequences)

    @property
    def needs_prompt_logprobs(self) -> bool:
        return len(self.prompt_logprobs) < len(self.request.prompt_token_ids)


class Sequence:
    """One token stream: prompt and output in `token_ids`, KV of a prefix in `block_tables`.

    `num_computed_tokens` counts positions whose KV exists once the submitted steps are done.
    The last of `token_ids` is `IN_FLIGHT` while a submitted step still draws it.
    """

    __slots__ = (
        "arrival_step",
        "block_hashes",
        "block_tables",
        "drafts",
        "epoch",
        "error",
        "finish_reason",
        "fork_source",
        "index",
        "last_step",
        "max_total_tokens",
        "num_computed_tokens",
        "num_dropped_blocks",
        "num_prompt_tokens",
        "num_shared_tokens",
        "num_sought_blocks",
        "num_submitted_tokens",
        "root_hash",
        "seq_id",
        "state",
        "status",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        state: RequestState,
        index: int,
        max_total_tokens: int,
        arrival_step: int,
    ) -> None:
        request = state.request
        self.seq_id = seq_id
        self.state = state
        self.index = index
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_total_tokens = max_total_tokens
        self.arrival_step = arrival_step
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_submitted_tokens = 0
        """Of the computed ones, those of steps submitted already: a block copy may read them."""
        self.num_shared_tokens = 0
        """Of a waiting one: what `BlockManager.shared_prefix` had for it when last asked."""
        self.num_sought_blocks = 0  # that the cache had, or the disk was asked for
        self.block_tables: tuple[list[int], ...] = ()  # one for each KV group, equally long
        self.num_dropped_blocks = 0
        """The first ones of sliding groups: others' by now, never read again."""
        self.block_hashes: list[BlockHash] = []
        """Hashes of the first full blocks of `token_ids`, extended as they are needed."""
        owner = request.cache_group or request.tenant
        self.root_hash = root_hash(
            request.artifact_id, owner, request.cache_salt, request.adapter_id
        )
        self.fork_source: Sequence | None = None
        self.drafts: Acceptance | None = None
        self.last_step = 0  # number of the last one that it was scheduled in
        self.epoch = 0  # grows when preempted: results of older steps must not commit blocks
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def is_waiting(self) -> bool:
        return self.status is SequenceStatus.WAITING

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1: a decode."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_missing_tokens(self) -> int:
        """What the backlog counts: at least one token while it waits, none once it decodes."""
        missing = self.num_remaining_tokens - self.num_shared_tokens
        return missing if missing > 1 or self.is_waiting else 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def has_token_in_flight(self) -> bool:
        return self.token_ids[-1] == IN_FLIGHT

    @property
    def is_full(self) -> bool:
        """No token may be added now: one in flight counts, and must land where draws read it."""
        is_at_end, request = len(self.token_ids) >= self.max_total_tokens, self.state.request
        is_read = request.grammar is not None or request.sampling.reads_output
        return is_at_end or (is_read and self.has_token_in_flight)

    @property
    def seniority(self) -> tuple[int, int]:
        """Smallest: the last to be preempted."""
        return (-self.state.request.priority, self.seq_id)

    @property
    def seed(self) -> int:
        return self.state.request.sampling.seed + self.index

    def stop_of(
        self, position: int, eos_token_ids: tuple[int, ...]
    ) -> tuple[FinishReason, int | None] | None:
        """Whether the token at `position` is the last, and the stop token if it is one."""
        sampling = self.state.request.sampling
        token_id = self.token_ids[position]
        num_output = position + 1 - self.num_prompt_tokens
        if num_output > sampling.min_tokens:
            if token_id in eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP, None
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP, token_id
        if position + 1 >= self.max_total_tokens:
            return FinishReason.LENGTH, None
        return None


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What one step did for one sequence."""

    seq: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
