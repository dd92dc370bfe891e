"""Who computes a model: an executor in this process, or the ranks that hold its slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torchweave_ray.models.spec import DecoderSpec, Executor
from torchweave_ray.runner.opening import RunnerParts


class OpenedModel(Protocol):
    @property
    def spec(self) -> DecoderSpec:
        """What this process computes of it."""
        ...

    def open_executor(self) -> Executor:
        """Map the weights, again after they were let go."""
        ...

    def release(self) -> None:
        """The weights that others hold for it."""
        ...

    def runner_parts(self) -> RunnerParts: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Alone:
    """In this process; the executor's memory is whoever's that holds it."""

    spec: DecoderSpec
    open_executor: Callable[[], Executor]

    def release(self) -> None: ...

    def runner_parts(self) -> RunnerParts:
        return RunnerParts()

    def close(self) -> None: ...
