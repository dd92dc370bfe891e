"""Runs a StepPlan on an Executor: batch, forward, edits, draws, logprobs, draft verification.

The engine's Runner with real tensors. `submit` computes, or has a GPU compute; `result` waits.
Keeps token counts of sequences, for penalties, and at step depth 1 the tokens still being drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
)
from torchweave_ray.models.spec import Executor
from torchweave_ray.runner.drawn import (
    NON_FINITE,
    Collected,
    DrawnTokens,
    DrawRow,
    RunningStep,
    scored_rows,
)
from torchweave_ray.runner.graphs import DecodeGraphs
from torchweave_ray.runner.inputs import Chunk, LastTokens, build_inputs
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
from torchweave_ray.runner.sampler import Draw, Sampler, sample
from torchweave_ray.sampling_params import SamplingParams

_NO_ADAPTERS: Mapping[str, object] = MappingProxyType({})
_POOLING = (StepOutput.POOL, StepOutput.POOL_ALL)


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
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`adapters`: those that are loaded, by id; it changes between steps. `graphs`: replay
        steps of decodes."""
        self._graphs = graphs
        self._executor = self._wrapped(executor)
        self._kv_cache = kv_cache
        self._limits = limits
        self._device = device
        self._sample = sampler
        self._adapters = adapters
        self._counts: dict[int, TokenCounts] = {}
        self._last: LastTokens | None = None

    @property
    def kv_cache(self) -> KVCache:
        return self._kv_cache

    @property
    def limits(self) -> RuntimeLimits:
        return self._limits

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Numbers of sequences for which the executor captures steps of decodes."""
        return () if self._graphs is None else self._graphs.ladder.sizes

    def submit(self, plan: StepPlan) -> PendingStep:
        num = len(plan.sequences)
        collected = Collected([[] for _ in range(num)], [None] * num)
        order: Sequence[int] = range(num)
        if any(seq.adapter_id for seq in plan.sequences):
            order = sorted(order, key=lambda index: plan.sequences[index].adapter_id)
        chunks = [(index, _chunk(plan, index)) for index in order]
        pooling = [c for _, c in chunks if c.sequence.output in _POOLING]
        with torch.inference_mode():
            self._kv_cache.copy_blocks(plan.block_copies)
            drawn = self._generate(plan, chunks, collected) if len(pooling) < num else None
            if pooling:
                self._pool(pooling, collected)
        return RunningStep(collected, drawn)

    def release(self, seq_id: int) -> None:
        self._counts.pop(seq_id, None)

    def check_health(self) -> None:
        """An error of this process shows in a step."""

    def reset(self) -> None:
        """Forget all sequences: a new engine counts them from the start."""
        self._counts.clear()
        self._last = None

    def close(self) -> None:
        self.reset()
        self._kv_cache.close()

    def release_memory(self) -> None:
        """Between steps, of no sequence: executor and KV cache are gone until `restore_memory`."""
        self.reset()
        self._kv_cache.close()
        del self._executor, self._sample

    def restore_memory(self, executor: Executor, sampler: Sampler) -> None:
        self._executor, self._sample = self._wrapped(executor), sampler
        self._kv_cache.open()

    def _pool(self, chunks: Sequence[Chunk], collected: Collected) -> None:
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

    def _wrapped(self, executor: Executor) -> Executor:
        return executor if self._graphs is None else self._graphs.wrap(executor)

    def _inputs(self, chunks: Sequence[Chunk]) -> StepInputs:
        size, groups = self._limits.block_size, self._limits.groups
        padding = None if self._graphs is None else self._graphs.ladder.fit(chunks, size)
        return build_inputs(chunks, size, self._device, self._adapters, self._last, padding, groups)

    def _generate(
        self, plan: StepPlan, chunks: Sequence[tuple[int, Chunk]], collected: Collected
    ) -> DrawnTokens | None:
        """`chunks`: with their indices in the plan."""
        rows: list[DrawRow] = []
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
                    rows.append(DrawRow(index, num_rows + num, seq, drafts))
            num_rows += chunk.num_logit_rows
        inputs = self._inputs(batch)
        logits = self._executor.forward(inputs, self._kv_cache.layers)
        assert logits.shape == (num_rows, self._limits.vocab_size)
        for seq, first_row in prompt_rows:
            self._score_prompt(seq, logits[first_row : first_row + seq.num_tokens], collected)
        drawn = None
        if rows:
            picked = logits if len(rows) == num_rows else logits[[row.row for row in rows]]
            drawn = self._draw(plan, rows, picked)
        if self._limits.step_depth:
            places = {row.sequence.seq_id: i for i, row in enumerate(rows)}
            self._last = None if drawn is None else LastTokens(drawn.ids, places)
        return drawn

    def _score_prompt(self, seq: ScheduledSequence, logits: Tensor, collected: Collected) -> None:
        """Logprobs of the tokens that follow this chunk's; the scheduler sees that all exist."""
        following = list(seq.token_ids[seq.start + 1 : seq.start + seq.num_tokens + 1])
        num_top = [seq.sampling.prompt_logprobs or 0] * seq.num_tokens
        entries = token_logprobs(logits, following, num_top)
        if all(math.isfinite(entry.logprob) for entry in entries):
            collected.prompt_logprobs[seq.seq_id] = entries
        else:
            collected.failed[seq.seq_id] = NON_FINITE

    def _draw(self, plan: StepPlan, rows: Sequence[DrawRow], logits: Tensor) -> DrawnTokens:
        """Draw all rows of logits [len(rows), V] at once."""
        scored = scored_rows(rows)
        raw = logits[scored] if scored else None  # a copy: edits come next
        edits = (self._edit(plan, row, i) for i, row in enumerate(rows))
        edit_logits(logits, [edit for edit in edits if edit is not None])
        drawn = self._sample(logits, [_draw_of(row) for row in rows])
        return DrawnTokens(rows, drawn, logits, raw)

    def _edit(self, plan: StepPlan, row: DrawRow, logits_row: int) -> LogitsEdit | None:
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

    def _counts_of(self, row: DrawRow) -> TokenCounts:
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


def _output_before(row: DrawRow) -> list[int]:
    """The generated tokens that this draw comes after."""
    seq = row.sequence
    end = seq.start + seq.num_tokens
    return [*seq.token_ids[seq.num_prompt_tokens : end], *row.draft_token_ids]


def _draw_of(row: DrawRow) -> Draw:
    seq = row.sequence
    return Draw(seq.sampling, seq.seed, seq.output_index + len(row.draft_token_ids))
