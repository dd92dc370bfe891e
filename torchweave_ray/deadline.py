"""By when a request wants to be done, and how it is told that it will not be."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable


class Late(enum.StrEnum):
    """`ChoiceDelta.error` of a request that ran out of time."""

    PASSED = "the deadline passed"
    HOPELESS = "the prompt cannot be computed before the deadline"


class Deadline(float):
    """A moment on this process's clock; pickled as the time left, as machines' clocks differ."""

    __slots__ = ()

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def seconds_left(self) -> float:
        return self - time.monotonic()

    def __reduce__(self) -> tuple[Callable[[float], Deadline], tuple[float]]:
        return Deadline.after, (self.seconds_left,)
