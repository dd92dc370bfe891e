"""What an operator sets about the HTTP API. Knows neither environment nor YAML."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Defaults for requests that do not say, and limits of one HTTP call."""

    default_model: str | None = None
    """For a request that names no model; None: the first one served."""
    max_new_tokens: int | None = None
    """None: up to the context length."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    """None: every request draws its own."""
    max_body_bytes: int = 4 << 20
    """A longer request body is refused with 413."""
    ping_interval_s: float = 15.0
    """A stream that has been silent for so long sends a comment, so that proxies keep it."""
    stream_keep_s: float = 60.0
    """How long after its end, or after its client was lost, a stream can be opened again; 0: never,
    and its events have no ids."""
    health_timeout_s: float = 5.0
    """A backend that says nothing for so long is not healthy."""
    keys_file: str | None = None
    """API keys, see access/key_file.py; None: everybody who reaches the server may use it."""
    metrics_need_key: bool = True
    """With a keys file: /metrics wants a key whose `operator` is set."""
    pages_need_key: bool = True
    """With a keys file: so do the playground and the API's description, any key."""
    usage_log: str | None = None
    """A folder for JSON lines that say what each call came to; None: no such log."""
    usage_log_max_bytes: int = 64 << 20
    """A file of it that has so many is followed by another. None is ever deleted."""
