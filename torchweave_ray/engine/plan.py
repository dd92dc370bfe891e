"""The contract between the scheduler and whatever runs the model.

A `StepPlan` says what one step computes, a `StepResult` what came of it, a `Runner` does it.
No torch here: the bitmask is a numpy array and everything else plain Python.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from torchweave_ray.engine.kv_groups import ONE_GROUP, KVGroups
from torchweave_ray.outputs import TokenLogprobs
from torchweave_ray.sampling_params import SamplingParams

IN_FLIGHT = -1
"""Stands for a token that the step before this one is still computing; the runner knows it."""


class StepOutput(enum.Enum):
    """What a sequence's rows of a step give back."""

    NONE = "none"
    SAMPLE = "sample"
    PROMPT_LOGPROBS = "prompt_logprobs"
    POOL = "pool"
    """The hidden state of the last position."""
    POOL_ALL = "pool_all"
    """The sum of those of all positions of the chunk."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_tokens` positions of one sequence, from `start`.

    The sequences are engine-owned views: `submit` reads what it needs of `token_ids` before it
    returns and never writes. `token_ids` is prompt and output; its last entry is `IN_FLIGHT`
    while the step before still computes it (step depth 1).
    """

    seq_id: int
    start: int
    """== num_computed_tokens: KV of all positions before it is in the cache."""
    num_tokens: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    block_tables: Sequence[Sequence[int]]
    """One for each KV group."""
    sampling: SamplingParams
    seed: int
    """Already includes the choice's index."""
    output: StepOutput = StepOutput.SAMPLE
    draft_token_ids: tuple[int, ...] = ()
    """Computed at the positions right behind `num_tokens`, which leaves them out, and verified."""
    banned_token_ids: tuple[int, ...] = ()
    """Never drawn in this step: end tokens before min_tokens."""
    adapter_id: str = ""
    """Of a LoRA adapter that is loaded; "": none."""

    @property
    def output_index(self) -> int:
        """Index of the generated token that this step draws: the Philox counter."""
        return self.start + self.num_tokens - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One model call: mixed prompt chunks and decodes, decodes first."""

    sequences: tuple[ScheduledSequence, ...]
    block_copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) block ids, copied before anything is computed."""
    bitmask: NDArray[np.int32] | None = None
    """[len(sequences), ceil(vocab_size / 32)], bit set: allowed. None: all allowed."""
    draft_bitmasks: Mapping[int, NDArray[np.int32]] = field(default_factory=dict)
    """By position in `sequences`: [drafts, words], what the draw behind each draft may give."""

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens + len(s.draft_token_ids) for s in self.sequences)


@dataclass(frozen=True, slots=True)
class StepResult:
    """By position in `StepPlan.sequences`, except `failed`."""

    token_ids: Sequence[Sequence[int]]
    """[] for no sample, [token], or the accepted drafts and one more."""
    logprobs: Sequence[Sequence[TokenLogprobs] | None] = ()
    """() when no sequence asked."""
    prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """By seq_id: one entry per computed position, for the token that follows it."""
    pooled: Mapping[int, Sequence[float]] = field(default_factory=dict)
    """By seq_id: final hidden states, as `StepOutput` asked for them."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """By seq_id: why this sequence cannot go on. The others can."""


@dataclass(frozen=True, slots=True)
class RuntimeLimits:
    """What was found at run time; returned, never written back into the config."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    step_depth: int = 0
    """Steps that may be in flight beside the one being scheduled: 0 or 1."""
    groups: KVGroups = ONE_GROUP


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step. An exception here is an engine failure."""
        ...


class Runner(Protocol):
    """Runs steps in the order they are submitted; any thread may ask for its health: EngineDead."""

    @property
    def limits(self) -> RuntimeLimits: ...

    def submit(self, plan: StepPlan) -> PendingStep: ...

    def release(self, seq_id: int) -> None:
        """Forget what is kept for a sequence that is over or preempted.

        Called between submits; a step submitted before still sees it. The id may come again.
        """
        ...

    def check_health(self) -> None: ...

    def close(self) -> None: ...
