"""What a request carries of the stream that it is part of, and whoever runs it keeps a while."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamOrigin:
    """The call whose stream a request is part of: enough for any ingress to make it again."""

    call_id: str
    """Unguessable: whoever knows it may read the stream."""
    path: str
    body: bytes
    """As the client sent it; of the call's first request only."""
    created: int
    """Unix seconds that the answer shows."""
    keep_s: float
    """How long after its end the stream can be opened again."""
    index: int
    """Of this request among the call's."""
    num_requests: int
    request_id: str
    """This and the next: what the request had before choices of it went on elsewhere."""
    n: int
    seed: int
