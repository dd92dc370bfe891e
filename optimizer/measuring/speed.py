"""How fast a staged model is beside its unoptimised source: torch on plain weights, in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from optimizer.measuring.model import MeasuredModel
from optimizer.measuring.step_cost import CHUNKS, DECODES, Batch, MeasuredStep, measure_beside

_SECONDS = 10.0
ALONE, CROWD, PROMPT = DECODES[0], DECODES[4], CHUNKS[3]


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of the executor's steps, without scheduling and sampling: 64 positions of
    context, the least of repeated runs."""

    executor: str
    decode_1: float
    """Of one sequence."""
    decode_16: float
    """Of 16 sequences together; 0 where the model's context is too short to measure."""
    prompt: float
    """Of a prompt's chunk of 256; 0 as above."""


@dataclass(frozen=True, slots=True)
class SpeedComparison:
    source: Speed
    staged: Speed

    @property
    def speedup(self) -> float:
        """Of one sequence's decodes."""
        return self.staged.decode_1 / self.source.decode_1


def compare_speed(
    source: MeasuredModel, staged: MeasuredModel, max_length: int
) -> SpeedComparison | None:
    """None: the model's context is too short to measure anything."""
    if max_length <= ALONE[0][0]:
        return None
    deadline = time.monotonic() + _SECONDS
    models = [source, staged]
    steps = measure_beside(models, max_length, deadline, (ALONE, CROWD, PROMPT))
    return SpeedComparison(*(_speed(m, found) for m, found in zip(models, steps, strict=True)))


def _speed(model: MeasuredModel, steps: Mapping[Batch, MeasuredStep]) -> Speed:
    found = [steps[b].tokens_per_s if b in steps else 0.0 for b in (ALONE, CROWD, PROMPT)]
    return Speed(model.executor_name, *found)
