"""Runs a StepPlan on an Executor: batch, forward, edits, draws, logprobs, draft verification.

The engine's Runner with real tensors, step depth 0: `submit` computes. Keeps nothing of a sequence
but its token counts (for penalties), and knows neither queues nor text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from torchweave_ray.attention.base import StepInputs
from torchweave_ray.engine.plan import (
    PendingStep,
    RuntimeLimits,
    ScheduledSequence,
    StepOutput,
    StepPlan,
    StepResult,
)
from torchweave_ray.models.spec import Executor
from torchweave_ray.outputs import TokenLogprobs
from torchweave_ray.runner.inputs import Chunk, build_inputs
from torchweave_ray.runner.kv_cache import KVCache
from torchweave_ray.runner.logits import (
    LogitsEdit,
    TokenCounts,
    bad_word_ends,
    edit_logits,
    is_allowed,
    is_constrained,
)
from torchweave_ray.runner.logprobs import token_logprobs
from torchweave_ray.runner.sampler import NO_TOKEN, Draw, Sampler, sample
from torchweave_ray.sampling_params import SamplingParams

_NO_ADAPTERS: Mapping[str, object] = MappingProxyType({})
_POOLING = (StepOutput.POOL, StepOutput.POOL_ALL)
NON_FINITE = "the model gave logits that are not finite"
NOTHING_ALLOWED = "no token is allowed here: bans, biases and grammar leave none"


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A PendingStep that is already computed."""

    step_result: StepResult

    def result(self) -> StepResult:
        return self.step_result


@dataclass(frozen=True, slots=True)
class _DrawRow:
    """A row of logits that draws a token."""

    index: int
    """Of the sequence in the plan."""
    row: int
    """Of the logits."""
    sequence: ScheduledSequence
    draft_token_ids: tuple[int, ...]
    """Drafts that stand between the sequence and this draw."""


@dataclass(slots=True)
class _Collected:
    """A StepResult in the making."""

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    pooled: dict[int, list[float]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def result(self) -> StepResult:
        asked = any(entries is not None for entries in self.logprobs)
        return StepResult(
            self.token_ids,
            self.logprobs if asked else (),
            self.prompt_logprobs,
            self.pooled,
            self.failed,
        )


class ModelRunner:
    """Implements engine.plan.Runner."""

    def __init__(
        self,
        executor: Executor,
        kv_cache: KVCache,
        limits: RuntimeLimits,
        device: torch.device,
        sampler: Sampler = sample,
        adapters: Mapping[str, object] = _NO_ADAPTERS,
    ) -> None:
        """`adapters`: those that are loaded, by id; it changes between steps."""
        assert limits.step_depth == 0
        self._executor = executor
        self._kv_cache = kv_cache
        self._limits = limits
        self._device = device
        self._sample = sampler
        self._adapters = adapters
        self._counts: dict[int, TokenCounts] = {}

    @property
    def kv_cache(self) -> KVCache:
        return self._kv_cache

    @property
    def limits(self) -> RuntimeLimits:
        return self._limits

    def submit(self, plan: StepPlan) -> PendingStep:
        num = len(plan.sequences)
        collected = _Collected([[] for _ in range(num)], [None] * num)
        order = sorted(range(num), key=lambda index: plan.sequences[index].adapter_id)
        chunks = [(index, _chunk(plan, index)) for index in order]
        pooling = [c for _, c in chunks if c.sequence.output in _POOLING]
        with torch.inference_mode():
            self._kv_cache.copy_blocks(plan.block_copies)
            if len(pooling) < num:
                self._generate(plan, chunks, collected)
            if pooling:
                self._pool(pooling, collected)
        return FinishedStep(collected.result())

    def release(self, seq_id: int) -> None:
        self._counts.pop(seq_id, None)

    def reset(self) -> None:
        """Forget all sequences: a new engine counts them from the start."""
        self._counts.clear()

    def close(self) -> None:
        self.reset()
        self._kv_cache.close()

    def release_memory(self) -> None:
        """Between steps, of no sequence: executor and KV cache are gone until `restore_memory`."""
        self.close()
        del self._executor, self._sample

    def restore_memory(self, executor: Executor, sampler: Sampler) -> None:
        self._executor, self._sample = executor, sampler
        self._kv_cache.open()

    def _pool(self, chunks: Sequence[Chunk], collected: _Collected) -> None:
        """Pooling sequences make a batch of their own: their head is another."""
        inputs = self._inputs(chunks)
        hidden = self._executor.hidden(inputs, self._kv_cache.layers)
        parts = torch.split(hidden, [chunk.num_logit_rows for chunk in chunks])
        for chunk, rows in zip(chunks, parts, strict=True):
            seq_id = chunk.sequence.seq_id
            if torch.isfinite(rows).all():
                collected.pooled[seq_id] = rows.sum(dim=0).tolist()
            else:
                collected.failed[seq_id] = "the model gave a hidden state that is not finite"

    def _inputs(self, chunks: Sequence[Chunk]) -> StepInputs:
        return build_inputs(chunks, self._limits.block_size, self._device, self._adapters)

    def _generate(
        self, plan: StepPlan, chunks: Sequence[tuple[int, Chunk]], collected: _Collected
    ) -> None:
        """`chunks`: with their indices in the plan."""
        rows: list[_DrawRow] = []
        batch: list[Chunk] = []
        prompt_rows: list[tuple[ScheduledSequence, int]] = []  # with the first of their logits
        num_rows = 0
        for index, chunk in chunks:
            seq = chunk.sequence
            if seq.output in _POOLING:
                continue
            batch.append(chunk)
            if seq.output is StepOutput.PROMPT_LOGPROBS:
                prompt_rows.append((seq, num_rows))
            elif seq.output is StepOutput.SAMPLE:
                for num in range(chunk.num_logit_rows):
                    drafts = chunk.draft_token_ids[:num]
                    rows.append(_DrawRow(index, num_rows + num, seq, drafts))
            num_rows += chunk.num_logit_rows
        inputs = self._inputs(batch)
        logits = self._executor.forward(inputs, self._kv_cache.layers)
        assert logits.shape == (num_rows, self._limits.vocab_size)
        for seq, first_row in prompt_rows:
            self._score_prompt(seq, logits[first_row : first_row + seq.num_tokens], collected)
        if rows:
            picked = logits if len(rows) == num_rows else logits[[row.row for row in rows]]
            self._draw(plan, rows, picked, collected)

    def _score_prompt(self, seq: ScheduledSequence, logits: Tensor, collected: _Collected) -> None:
        """Logprobs of the tokens that follow this chunk's; the scheduler sees that all exist."""
        following = list(seq.token_ids[seq.start + 1 : seq.start + seq.num_tokens + 1])
        num_top = [seq.sampling.prompt_logprobs or 0] * seq.num_tokens
        entries = token_logprobs(logits, following, num_top)
        if all(math.isfinite(entry.logprob) for entry in entries):
            collected.prompt_logprobs[seq.seq_id] = entries
        else:
            collected.failed[seq.seq_id] = NON_FINITE

    def _draw(
        self,
        plan: StepPlan,
        rows: Sequence[_DrawRow],
        logits: Tensor,
        collected: _Collected,
    ) -> None:
        """Draw all rows of logits [len(rows), V] at once, then keep what the drafts allow."""
        scored = [i for i, row in enumerate(rows) if row.sequence.sampling.logprobs is not None]
        raw = logits[scored] if scored else None  # a copy: edits come next
        edits = (self._edit(plan, row, i) for i, row in enumerate(rows))
        edit_logits(logits, [edit for edit in edits if edit is not None])
        drawn = self._sample(logits, [_draw_of(row) for row in rows])
        for i, (row, token_id) in enumerate(zip(rows, drawn, strict=True)):
            tokens = collected.token_ids[row.index]
            if list(row.draft_token_ids) != tokens:
                continue  # an earlier draft was not what its draw gave
            if token_id != NO_TOKEN:
                tokens.append(token_id)
            elif not tokens:
                collected.failed[row.sequence.seq_id] = _why_no_token(logits[i])
        if raw is not None:
            _score_tokens([rows[i] for i in scored], [drawn[i] for i in scored], raw, collected)

    def _edit(self, plan: StepPlan, row: _DrawRow, logits_row: int) -> LogitsEdit | None:
        seq = row.sequence
        allowed = None
        if plan.bitmask is not None and is_constrained(plan.bitmask[row.index]):
            num_drafts = len(row.draft_token_ids)
            behind = plan.draft_bitmasks[row.index] if num_drafts else plan.bitmask
            allowed = behind[num_drafts - 1] if num_drafts else behind[row.index]
        sampling, banned = seq.sampling, seq.banned_token_ids
        if sampling.thinking is not None:
            forced = sampling.thinking.forced_token(_output_before(row))
            # A grammar's word goes first: nothing is forced into a call that is being written.
            if forced is not None and (allowed is None or is_allowed(allowed, forced)):
                return LogitsEdit(logits_row, SamplingParams(allowed_token_ids=(forced,)))
        counts = self._counts_of(row) if sampling.has_penalties else None
        if sampling.bad_words:
            banned += bad_word_ends(sampling.bad_words, _output_before(row))
        is_plain = not (banned or sampling.logit_bias or sampling.allowed_token_ids)
        if is_plain and allowed is None and counts is None:
            return None
        return LogitsEdit(logits_row, sampling, banned, counts, allowed)

    def _counts_of(self, row: _DrawRow) -> TokenCounts:
        seq = row.sequence
        counts = self._counts.get(seq.seq_id)
        if counts is None:
            counts = self._counts[seq.seq_id] = TokenCounts()
        # Up to the draw only: what follows in the list is a token still in flight.
        counts.advance(seq.token_ids, seq.start + seq.num_tokens, seq.num_prompt_tokens)
        return counts.with_output(row.draft_token_ids) if row.draft_token_ids else counts


def _chunk(plan: StepPlan, index: int) -> Chunk:
    seq = plan.sequences[index]
    return Chunk(seq, seq.draft_token_ids if seq.output is StepOutput.SAMPLE else ())


def _output_before(row: _DrawRow) -> list[int]:
    """The generated tokens that this draw comes after."""
    seq = row.sequence
    end = seq.start + seq.num_tokens
    return [*seq.token_ids[seq.num_prompt_tokens : end], *row.draft_token_ids]


def _draw_of(row: _DrawRow) -> Draw:
    seq = row.sequence
    return Draw(seq.sampling, seq.seed, seq.output_index + len(row.draft_token_ids))


def _why_no_token(logits: Tensor) -> str:
    return NOTHING_ALLOWED if logits.max().item() == -math.inf else NON_FINITE


def _score_tokens(
    rows: Sequence[_DrawRow], drawn: Sequence[int], raw: Tensor, collected: _Collected
) -> None:
    """Logprobs of the kept tokens, from raw logits [len(rows), V]."""
    num_top = [row.sequence.sampling.logprobs or 0 for row in rows]
    safe = [max(token_id, 0) for token_id in drawn]  # NO_TOKEN is scored, but never kept
    for row, entry in zip(rows, token_logprobs(raw, safe, num_top), strict=True):
        entries = collected.logprobs[row.index]
        if entries is None:
            entries = collected.logprobs[row.index] = []
        if len(row.draft_token_ids) < len(collected.token_ids[row.index]):
            entries.append(entry)
