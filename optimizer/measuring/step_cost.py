"""Measures what a step costs on this machine and fits a + b * tokens + c * sum(tokens * context).

The context of a token is taken as the scheduler takes it: n tokens behind `start` others have
start + n / 2 each. What is timed is the executor's call, without scheduling and sampling.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optimizer.measuring.model import MeasuredModel, make_inputs

Batch = tuple[tuple[int, int], ...]
_CONTEXT = 512
_BATCHES: tuple[Batch, ...] = (
    ((64, 1),),
    ((64, 1),) * 4,
    ((64, 1),) * 8,
    ((480, 1),) * 8,
    ((0, 32),),
    ((0, 128),),
    ((384, 128),),
    ((0, 512),),
)
_MIN_REPEATS, _MAX_REPEATS = 3, 50
BATCH_S = 0.3
"""A batch is run again until this time is spent."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    num_tokens: int
    token_context: float
    ms: float
    """Least of the runs: what others do on the machine meanwhile does not count."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Milliseconds; the fields of the scheduler's own."""

    a: float
    b: float
    c: float

    def predict(self, step: MeasuredStep) -> float:
        return self.a + self.b * step.num_tokens + self.c * step.token_context


@torch.inference_mode()
def measure_steps(model: MeasuredModel, max_length: int) -> list[MeasuredStep]:
    longest = min(_CONTEXT, max_length)
    batches = [b for b in _BATCHES if max(start + n for start, n in b) <= longest]
    kv = model.cache(longest, num_seqs=max(len(batch) for batch in batches))
    steps = []
    for batch in batches:
        num_tokens = sum(n for _, n in batch)
        ids = torch.arange(num_tokens) % model.spec.vocab_size
        took: list[float] = []
        for _ in range(_MAX_REPEATS):
            inputs = make_inputs(batch, ids, longest)
            started = time.perf_counter()
            model.executor.forward(inputs, kv)
            took.append(time.perf_counter() - started)
            if len(took) >= _MIN_REPEATS and sum(took) > BATCH_S:
                break
        context = sum(n * (start + n / 2) for start, n in batch)
        steps.append(MeasuredStep(num_tokens, context, round(1e3 * min(took), 4)))
    return steps


def fit_step_cost(steps: Sequence[MeasuredStep]) -> StepCost:
    """Least squares of the relative errors, no coefficient below 0."""
    times = np.array([step.ms for step in steps])
    terms = np.array([[1.0, step.num_tokens, step.token_context] for step in steps])
    weighted = terms / times[:, None]
    best, least = np.zeros(3), np.inf
    for size in range(1, min(3, len(steps)) + 1):
        for chosen in itertools.combinations(range(3), size):
            found: Any = np.linalg.lstsq(weighted[:, chosen], np.ones(len(steps)), rcond=None)[0]
            coefficients = np.zeros(3)
            coefficients[list(chosen)] = found
            error = float(((weighted @ coefficients - 1.0) ** 2).sum())
            if (coefficients >= 0).all() and error < least:
                best, least = coefficients, error
    a, b, c = (float(f"{value:.6g}") for value in best)
    return StepCost(a, b, c)
