"""The one error tree.

    TorchWeaveError
    ├── RequestError            answers one request with an HTTP status
    │   ├── InvalidRequest      400, names the field in ``param``
    │   ├── Unauthenticated     401
    │   ├── Forbidden           403
    │   ├── ModelNotFound       404
    │   ├── RequestNotFound     404, of a request that is to be stopped
    │   ├── RequestTimeout      408, of a body that does not come
    │   ├── RequestTooLarge     413
    │   ├── HeadersTooLarge     431
    │   ├── Overloaded          429, ``retry_after`` seconds
    │   │   └── RateLimited     429, of one caller
    │   ├── Unavailable         503, ``retry_after`` seconds
    │   └── DeadlineExceeded    504
    ├── EngineError
    │   ├── SequenceFailed      ends one stream with finish_reason="error"
    │   └── EngineDead          check_health raises it; Ray replaces the replica
    ├── ArtifactError           a replica refuses to start; the text names the file
    └── ConfigError             an unknown key or a value out of range

Knows nothing of HTTP libraries: `api` turns these into responses.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TorchWeaveError(Exception):
    """Root of everything this project raises on purpose."""


class RequestError(TorchWeaveError):
    """Answers one request. All arguments are positional so that it pickles through Ray."""

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, param, code, retry_after)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of every error answer: ``{"error": {message, type, param, code}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(RequestError):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(RequestError):
    status = 401
    type = "authentication_error"


class Forbidden(RequestError):
    status = 403
    type = "permission_error"


class ModelNotFound(RequestError):
    status = 404
    type = "invalid_request_error"


def model_not_found(name: str, served: Iterable[str]) -> ModelNotFound:
    there_is = ", ".join(sorted(served))
    return ModelNotFound(f"no model {name!r}; there is {there_is}", "model", "model_not_found")


class RequestNotFound(RequestError):
    status = 404
    type = "invalid_request_error"


class RequestTimeout(RequestError):
    status = 408
    type = "invalid_request_error"


class HeadersTooLarge(RequestError):
    status = 431
    type = "invalid_request_error"


class RequestTooLarge(RequestError):
    status = 413
    type = "invalid_request_error"


class Overloaded(RequestError):
    status = 429
    type = "rate_limit_error"


class RateLimited(Overloaded):
    """The caller has used up what its key allows; the server may have room."""


class Unavailable(RequestError):
    status = 503
    type = "service_unavailable_error"


class DeadlineExceeded(RequestError):
    status = 504
    type = "timeout_error"


class EngineError(TorchWeaveError):
    """The engine itself went wrong."""


class SequenceFailed(EngineError):
    """One sequence failed; the others go on."""


class EngineDead(EngineError):
    """The engine cannot go on; the replica must be replaced."""


class ArtifactError(TorchWeaveError):
    """An artifact is missing, tampered, half-written or of a format we cannot read."""


class ConfigError(TorchWeaveError):
    """A configuration key is unknown or its value cannot be used."""


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint for an unknown key: ``; did you mean 'x'?`` or the list of known keys."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known keys: {', '.join(names)}"
