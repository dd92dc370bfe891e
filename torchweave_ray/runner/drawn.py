"""What a step draws, from the rows of logits to its `StepResult`: nothing waits before `result`.

Knows no executor: the runner says which rows there are, and which token each drew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchweave_ray.engine.plan import ScheduledSequence, StepResult
from torchweave_ray.outputs import TokenLogprobs
from torchweave_ray.runner.device import Fetch
from torchweave_ray.runner.logprobs import TokenScores
from torchweave_ray.runner.sampler import NO_TOKEN, NOTHING_ALLOWED

NON_FINITE = "the model gave logits that are not finite"
NOTHING_LEFT = "no token is allowed here: bans, biases and grammar leave none"


@dataclass(frozen=True, slots=True)
class DrawRow:
    """A row of logits that draws a token."""

    index: int
    """Of the sequence in the plan."""
    row: int
    """Of the logits."""
    sequence: ScheduledSequence
    draft_token_ids: tuple[int, ...]
    """Drafts that stand between the sequence and this draw."""


@dataclass(slots=True)
class Collected:
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


def scored_rows(rows: Sequence[DrawRow]) -> list[int]:
    """Which of them belong to sequences that ask for logprobs."""
    return [i for i, row in enumerate(rows) if row.sequence.sampling.logprobs is not None]


class DrawnTokens:
    """The tokens of all rows, on their way from the device."""

    def __init__(
        self,
        rows: Sequence[DrawRow],
        drawn: Tensor | list[int],
        logits: Tensor,
        raw: Tensor | None,
    ) -> None:
        """drawn [R] of edited logits [R, V]; raw [scored, V]: logits before the edits, of the rows
        whose sequences ask for logprobs."""
        self._rows = rows
        self.ids = torch.as_tensor(drawn, device=logits.device)
        self._logits = logits
        self._scored = scored_rows(rows)
        self._scores: TokenScores | None = None
        if raw is not None:
            num_top = [rows[i].sequence.sampling.logprobs or 0 for i in self._scored]
            ids = self.ids if len(self._scored) == len(rows) else self.ids[self._scored]
            self._scores = TokenScores(raw, ids, num_top)
        self._fetch = Fetch([self.ids])

    def collect(self, collected: Collected) -> None:
        """Wait for them; keep what the drafts allow."""
        (ids,) = self._fetch.get()
        drawn: list[int] = ids.tolist()
        for i, (row, token_id) in enumerate(zip(self._rows, drawn, strict=True)):
            tokens = collected.token_ids[row.index]
            if list(row.draft_token_ids) != tokens:
                continue  # an earlier draft was not what its draw gave
            if token_id >= 0:
                tokens.append(token_id)
            elif not tokens:
                collected.failed[row.sequence.seq_id] = self._why_no_token(i, token_id)
        if self._scores is not None:
            self._keep_scores(self._scores.entries(), collected)

    def _why_no_token(self, row: int, token_id: int) -> str:
        if token_id == NO_TOKEN and self._logits[row].max().item() != -math.inf:
            return NON_FINITE
        assert token_id in (NO_TOKEN, NOTHING_ALLOWED)
        return NOTHING_LEFT

    def _keep_scores(self, scores: Sequence[TokenLogprobs], collected: Collected) -> None:
        """Of the kept tokens."""
        for i, entry in zip(self._scored, scores, strict=True):
            row = self._rows[i]
            entries = collected.logprobs[row.index]
            if entries is None:
                entries = collected.logprobs[row.index] = []
            if len(row.draft_token_ids) < len(collected.token_ids[row.index]):
                entries.append(entry)


class RunningStep:
    """A PendingStep: submitted, perhaps computed by now."""

    def __init__(self, collected: Collected, drawn: DrawnTokens | None) -> None:
        self._collected = collected
        self._drawn = drawn
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            if self._drawn is not None:
                self._drawn.collect(self._collected)
            self._result = self._collected.result()
        return self._result
