"""Text to token ids and back. The engine sees only the two protocols below.

`load_tokenizer` (defined further down) reads an artifact's tokenizer files without torch; only
rendering a chat template needs transformers, and only the ingress does that.
"""

from __future__ import annotations

from typing import Protocol


class TokenDecoder(Protocol):
    """Incremental text of one sequence."""

    def step(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        ...


class Detokenizer(Protocol):
    """Makes decoders; all the engine knows of a tokenizer."""

    def decoder(self, skip_special_tokens: bool) -> TokenDecoder: ...
