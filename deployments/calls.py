"""What ingress and replica say to each other over Serve handles; tokens may go by the bus.

Refusals travel as values, not as exceptions: Serve logs a traceback for every exception, and a
flood of 429s must not cost one each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torchweave_ray.errors import Overloaded, RequestError, TorchWeaveError, Unavailable
from torchweave_ray.outputs import ModelInfo, RequestOutput, Timings, Usage


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a call whose tokens went by the bus."""

    num_entries: int
    """Entries the bus carried for it: the ingress reads on until it has them all."""
    usage: Usage
    timings: Timings | None


@dataclass(frozen=True, slots=True)
class BusFailed:
    """The replica could not reach the ingress, or lost it on the way."""

    reason: str


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine is dead; this replica is about to be replaced."""

    reason: str
    replica: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """This replica has no room now; another one may."""

    error: RequestError
    replica: str


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life on a stream of items, the first one before all items."""

    replica: str = ""
    artifact_id: str = ""
    numerics_id: str = ""


CallResult: TypeAlias = Finished | BusFailed | EngineFailed | Refused | RequestError
StreamItem: TypeAlias = RequestOutput | Alive | EngineFailed | Refused | RequestError


@dataclass(frozen=True, slots=True)
class Description:
    """What an ingress needs of a model, so that it has to stage nothing itself."""

    info: ModelInfo
    files: dict[str, bytes]
    """The artifact's tokenizer and config files by name."""
    startup_s: dict[str, float]
    """Seconds by stage of this replica's start."""


def as_value(error: TorchWeaveError, replica: str) -> RequestError | Refused | EngineFailed:
    if isinstance(error, Overloaded | Unavailable):
        return Refused(error, replica)
    return error if isinstance(error, RequestError) else EngineFailed(str(error), replica)
