"""Stage 7: what steps of this model cost on this machine, and the settings that are fastest here.

The result belongs to the machine, not to the model: it goes into the report, under a fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimizer.measuring.model import MeasuredModel, all_cores, open_staged
from optimizer.measuring.step_cost import (
    CHUNKS,
    DECODES,
    Batch,
    MeasuredStep,
    fit_step_cost,
    measure_steps,
)
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.store import write_atomically
from optimizer.target import why_not_measured
from torchweave_ray.kernels.machine import fingerprint
from torchweave_ray.models.artifact import WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig

RESULT = "tuning.json"
_THREADS_SHARE = 0.3
"""Of the budget, for the number of threads; the rest is for steps with the best one."""
_WORTH_IT = 0.97
"""The smallest chunk counts that reaches this share of the best speed."""
_CLEARLY_FASTER = 0.85
"""Fewer threads are taken if they need at most this share of the time of all: a busy machine makes
them look some percent faster, and on a quiet one they would cost a multiple of that."""
_SETTINGS: tuple[Batch, ...] = CHUNKS[2:]
"""Chunks that may become the limit of a step: smaller ones save nobody any waiting."""
_PROBES: tuple[Batch, ...] = (DECODES[0], DECODES[3], CHUNKS[2])

_LOG = logging.getLogger("torchweave.optimizer")


@dataclass(frozen=True)
class TuneStage:
    recipe: Recipe
    progress: Progress
    name: str = "tune"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"target": self.recipe.target, "budget_s": self.recipe.tuning_budget_s}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Leaves `RESULT`: fingerprint, settings, and the steps that they come from; or why not."""
        folder = work / self.name
        folder.mkdir(exist_ok=True)
        why = why_not_measured(self.recipe.target)
        if self.recipe.tuning_budget_s == 0:
            why = "the recipe's tuning_budget_s is 0"
        if why is not None:
            _LOG.warning("[Optimizer] %s is not tuned: %s", self.recipe.name, why)
            values: dict[str, Any] = {"skipped": why}
        else:
            values = self._tune(work / "pack", manifest)
        write_atomically(folder / RESULT, json.dumps(values))
        return manifest

    def _tune(self, packed: Path, manifest: Manifest) -> dict[str, Any]:
        started = time.monotonic()
        budget = self.recipe.tuning_budget_s
        size = (packed / WEIGHTS).stat().st_size
        self.progress.expect(size)
        longest = ModelConfig.read(packed).max_position_embeddings
        with all_cores() as cores:
            candidates = sorted({cores, max(1, cores // 2)}, reverse=True)
            probed: dict[int, dict[Batch, MeasuredStep]] = {}
            for index, threads in enumerate(candidates if len(candidates) > 1 else ()):
                share = _THREADS_SHARE * budget * (index + 1) / len(candidates)
                model = _open(packed, manifest, threads)
                probed[threads] = measure_steps(model, longest, started + share, _PROBES)
            threads = choose_threads(probed) if probed else cores
            model = _open(packed, manifest, threads)
            steps = measure_steps(model, longest, started + budget)
        self.progress.advance(size)
        cost = fit_step_cost(list(steps.values()))
        return {
            "fingerprint": fingerprint(model.executor_name, threads),
            "step_cost": dataclasses.asdict(cost),
            "max_num_batched_tokens": knee(_speeds(steps, _SETTINGS)),
            "decode_tokens_per_s": _speeds(steps, DECODES),
            "prompt_tokens_per_s": _speeds(steps, CHUNKS),
            "threads_ms": {
                str(n): [step.ms for step in found.values()] for n, found in probed.items()
            },
            "steps": [
                dataclasses.asdict(step) | {"predicted_ms": round(cost.predict(step), 4)}
                for step in steps.values()
            ],
        }


def choose_threads(probed: Mapping[int, Mapping[Batch, MeasuredStep]]) -> int:
    """By number of threads: the same steps. The most, unless fewer are clearly faster."""
    most = max(probed)
    ratios = {
        threads: sum(step.ms / probed[most][batch].ms for batch, step in steps.items()) / len(steps)
        for threads, steps in probed.items()
    }
    best = min(ratios, key=lambda threads: ratios[threads])
    return best if ratios[best] <= _CLEARLY_FASTER else most


def knee(speeds: Mapping[str, float]) -> int | None:
    """The smallest number of tokens whose speed is as good as the best: more make others wait.
    None: nothing was short enough for the model."""
    if not speeds:
        return None
    best = max(speeds.values())
    return min(int(n) for n, speed in speeds.items() if speed >= _WORTH_IT * best)


def _open(packed: Path, manifest: Manifest, threads: int) -> MeasuredModel:
    torch.set_num_threads(threads)
    return open_staged(packed, manifest, threads)


def _speeds(steps: Mapping[Batch, MeasuredStep], batches: tuple[Batch, ...]) -> dict[str, float]:
    """Tokens a second by the number of a step's tokens."""
    found = [steps[batch] for batch in batches if batch in steps]
    return {str(step.num_tokens): step.tokens_per_s for step in found}
