"""Which failures of a remote side are worth another try, and how long to wait before it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from optimizer.disk_space import FULL
from torchweave_ray.errors import TorchWeaveError

MAX_TRIES = 6
FIRST_WAIT_S = 0.5
"""Doubled after each try: 15 s in all."""
_LONGEST_WAIT_S = 30.0
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# Another try gives the same answer. The last ones: certificates, and clouds' missing keys.
_PERMANENT: tuple[type[Exception], ...] = (
    TorchWeaveError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotImplementedError,
    ImportError,
    ValueError,
    TypeError,
)
_PERMANENT_NAMES = frozenset({"SSLError", "NoCredentialsError", "DefaultCredentialsError"})

T = TypeVar("T")


class HttpStatus(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, retry_after: float | None = None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.retry_after = retry_after


def retried(action: Callable[[], T]) -> T:
    """What `action` returns, after MAX_TRIES at most. Raises its last error."""
    for tried in range(1, MAX_TRIES):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            wait = FIRST_WAIT_S * 2 ** (tried - 1) * random.uniform(0.75, 1.25)
            asked = getattr(error, "retry_after", None) or 0.0
            time.sleep(min(max(wait, asked), _LONGEST_WAIT_S))
    return action()


def is_transient(error: Exception) -> bool:
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT
    if isinstance(error, OSError) and error.errno in FULL:
        return False  # of this disk
    return not isinstance(error, _PERMANENT) and type(error).__name__ not in _PERMANENT_NAMES


def status_of(error: Exception) -> int | None:
    """The HTTP status in it, as the clouds' clients put it there."""
    if isinstance(error, FileNotFoundError):
        return 404
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for value in (getattr(error, "status", None), getattr(error, "code", None), response):
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return 403 if isinstance(error, PermissionError) else None
