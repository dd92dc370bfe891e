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

from optimizer.measuring.model import BLOCK, MeasuredModel, make_inputs, num_blocks
from torchweave_ray.attention.base import LayerKV

Batch = tuple[tuple[int, int], ...]
DECODES: tuple[Batch, ...] = tuple(((64, 1),) * n for n in (1, 2, 4, 8, 16, 32))
CHUNKS: tuple[Batch, ...] = tuple(((0, n),) for n in (32, 64, 128, 256, 512))
BATCHES: tuple[Batch, ...] = (*DECODES, *CHUNKS, ((480, 1),) * 8, ((384, 128),))
_MIN_REPEATS = 3
MAX_REPEATS = 50
_BATCH_S = 0.3
"""A batch is run again until this time is spent, or all are out of time."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    num_tokens: int
    token_context: float
    ms: float
    """Least of the runs: what others do on the machine meanwhile does not count."""

    @property
    def tokens_per_s(self) -> float:
        return round(1e3 * self.num_tokens / self.ms, 1)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Milliseconds; the fields of the scheduler's own."""

    a: float
    b: float
    c: float

    def predict(self, step: MeasuredStep) -> float:
        return self.a + self.b * step.num_tokens + self.c * step.token_context


def measure_steps(
    model: MeasuredModel, max_length: int, deadline: float, batches: Sequence[Batch] = BATCHES
) -> dict[Batch, MeasuredStep]:
    """Of those batches that fit the model. `deadline`: as of time.monotonic(); one run each is made
    whatever it says."""
    (steps,) = measure_beside([model], max_length, deadline, batches)
    return steps


@torch.inference_mode()
def measure_beside(
    models: Sequence[MeasuredModel], max_length: int, deadline: float, batches: Sequence[Batch]
) -> list[dict[Batch, MeasuredStep]]:
    """One after another in turns, so that what else the machine does meets all alike."""
    fitting = [b for b in batches if max(start + n for start, n in b) <= max_length]
    blocks = max(len(batch) * num_blocks(_longest(batch)) for batch in fitting)
    caches = [model.cache(blocks * BLOCK) for model in models]
    took: dict[tuple[int, Batch], list[float]] = {}
    for repeat in range(MAX_REPEATS):
        for batch in fitting:
            for index, (model, kv) in enumerate(zip(models, caches, strict=True)):
                times = took.setdefault((index, batch), [])
                if repeat and time.monotonic() > deadline:
                    break
                if len(times) < _MIN_REPEATS or sum(times) < _BATCH_S:
                    times.append(_run(model, batch, kv))
    return [
        {batch: _measured(batch, min(took[index, batch])) for batch in fitting}
        for index in range(len(models))
    ]


def _run(model: MeasuredModel, batch: Batch, kv: Sequence[LayerKV]) -> float:
    ids = torch.arange(sum(n for _, n in batch)) % model.spec.vocab_size
    inputs = make_inputs(batch, ids, _longest(batch))
    started = time.perf_counter()
    model.executor.forward(inputs, kv)
    return time.perf_counter() - started


def _measured(batch: Batch, seconds: float) -> MeasuredStep:
    context = sum(n * (start + n / 2) for start, n in batch)
    return MeasuredStep(sum(n for _, n in batch), context, round(1e3 * seconds, 4))


def _longest(batch: Batch) -> int:
    return max(start + n for start, n in batch)


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
