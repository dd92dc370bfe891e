"""Settings that the optimizer measured for an artifact, and whether they hold on this machine.

They are in the artifact's report under a fingerprint of the machine. Elsewhere they are left out
with a warning, and what the configuration says comes before them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torchweave_ray.config import SchedulerConfig, StepCost
from torchweave_ray.kernels.machine import fingerprint, num_cores
from torchweave_ray.models.artifact import read_report

logger = logging.getLogger(__name__)
_OF_THE_MACHINE = ("cpu", "cores")
"""Of a fingerprint, what is known before a model is loaded."""


@dataclass(frozen=True, slots=True)
class TunedSettings:
    step_cost: StepCost | None = None
    max_num_batched_tokens: int | None = None

    def fill(self, scheduler: SchedulerConfig) -> SchedulerConfig:
        """What the configuration leaves open is taken from here; then a limit of tokens is set."""
        cost, tokens = scheduler.step_cost, scheduler.max_num_batched_tokens
        if tokens is None:
            tuned = self.max_num_batched_tokens or scheduler.step_tokens
            tokens = max(tuned, scheduler.max_num_seqs)
        return replace(scheduler, step_cost=cost or self.step_cost, max_num_batched_tokens=tokens)


def tuned_threads(directory: Path) -> int | None:
    """CPU threads to run with, never more than this process has cores; None: nothing is known."""
    try:
        found = dict(read_report(directory)["tuning"]["fingerprint"])
        here = fingerprint("", 0)
        if all(found[name] == here[name] for name in _OF_THE_MACHINE):
            return max(1, min(int(found["threads"]), num_cores()))
    except (KeyError, TypeError, ValueError):
        return None
    return None


def tuned_settings(
    directory: Path, found: Mapping[str, str | int], scheduler: SchedulerConfig
) -> TunedSettings:
    """The report's if they were measured on what is `found` here, with a warning if elsewhere.
    None leave steps their limit of tokens and take from `max_step_ms` its effect, so that nothing
    was measured at all is worth a warning where that is set."""
    level = logging.DEBUG if scheduler.max_step_ms is None else logging.WARNING
    tuning = read_report(directory).get("tuning")
    try:
        if tuning is None:
            why = "it was not tuned"
        elif "skipped" in tuning:
            why = f"it was not tuned: {tuning['skipped']}"
        elif tuning["fingerprint"] == dict(found):
            cost = StepCost(**{key: float(tuning["step_cost"][key]) for key in "abc"})
            tokens = tuning.get("max_num_batched_tokens")
            return TunedSettings(cost, None if tokens is None else int(tokens))
        else:
            why, level = f"it was tuned on {tuning['fingerprint']}", logging.WARNING
    except (KeyError, TypeError, ValueError) as error:
        why = f"its report cannot be read ({error!r})"
    if scheduler.step_cost is not None:
        return TunedSettings()
    logger.log(
        level,
        "[Scheduler] no step costs for %s on %s: %s; max_step_ms has no effect, steps are limited "
        "by max_num_batched_tokens",
        directory.name,
        dict(found) or "this device",
        why,
    )
    return TunedSettings()
