"""What an operator sets about the HTTP API. Knows neither environment nor YAML."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torchweave_ray.errors import ConfigError
from torchweave_ray.sampling_params import MAX_STOP_STRINGS


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
    body_timeout_s: float = 60.0
    """A body that is not here by then is refused with 408."""
    write_timeout_s: float = 120.0
    """A client that has taken nothing for so long, while there is something for it, is let go."""
    max_header_bytes: int = 32 << 10
    """Of path and headers together; more is refused with 431."""
    max_json_depth: int = 64
    """Levels of a body, and so of a schema in it."""
    max_prompt_tokens: int | None = None
    """None: what the context holds."""
    max_choices: int = 128
    """Prompts of a call times `n`."""
    max_stop_strings: int = 16
    max_logit_bias: int = 1024
    """Entries of logit_bias, and of stop_token_ids."""
    max_grammar_chars: int = 64 << 10
    """Of a schema, regex or grammar, as text."""
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_limit = field.name.startswith("max_") or field.name.endswith("_timeout_s")
            if is_limit and value is not None and value <= 0:
                raise ConfigError(f"api.{field.name} must be above 0, got {value:g}")
            most = _MOST.get(field.name)
            if most is not None and value > most:
                raise ConfigError(f"api.{field.name} must be at most {most}, got {value}")


_MOST = {
    "max_choices": 128,
    "max_stop_strings": MAX_STOP_STRINGS,
    "max_grammar_chars": 64 << 10,
    "max_json_depth": 200,
}
"""What the code can take."""
