"""Log-probabilities in OpenAI's two shapes. Token texts are exact: broken ones show their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torchweave_ray.outputs import TokenLogprobs
from torchweave_ray.tokenizer import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


def completion_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprobs], offset: int = 0
) -> dict[str, Any]:
    """The parallel lists of /v1/completions; `offset` is where the first token's text begins."""
    tokens, logprobs, tops, offsets = [], [], [], []
    for entry in entries:
        token = _token_text(tokenizer, entry.token_id)
        tokens.append(token)
        logprobs.append(_finite(entry.logprob))
        top = {_token_text(tokenizer, i): _finite(value) for i, value in entry.top}
        tops.append({**top, token: _finite(entry.logprob)})
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The nested lists of /v1/chat/completions."""
    content = [
        {
            **_chat_token(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, i, value) for i, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": _finite(logprob),
        "bytes": list(raw),
    }


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Tokens are keys here, so a part of a character is written as its bytes, as OpenAI did."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
