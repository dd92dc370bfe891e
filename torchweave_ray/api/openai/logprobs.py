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


def echoed_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], entries: Sequence[TokenLogprobs | None]
) -> dict[str, Any]:
    """The same lists for a prompt, whose first token has no log-probability."""
    first = _token_text(tokenizer, prompt[0])
    rest = [entry for entry in entries[1:] if entry is not None]
    shown = completion_logprobs(tokenizer, rest, len(first))
    return {
        "tokens": [first, *shown["tokens"]],
        "token_logprobs": [None, *shown["token_logprobs"]],
        "top_logprobs": [None, *shown["top_logprobs"]],
        "text_offset": [0, *shown["text_offset"]],
    }


def joined_logprobs(*parts: dict[str, Any] | None) -> dict[str, Any] | None:
    """The lists of several, one behind the other; None when there are none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return {name: [value for part in found for value in part[name]] for name in found[0]}


def prompt_logprobs_json(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """By position: token id to its log-probability, rank and text, as vLLM has it."""
    return [None if entry is None else _by_token(tokenizer, entry) for entry in entries]


def _by_token(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, Any]:
    ranked = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, 1)}
    ranked[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {
            "logprob": _finite(value),
            "rank": rank,
            "decoded_token": tokenizer.token_bytes(token_id).decode("utf-8", "replace"),
        }
        for token_id, (value, rank) in ranked.items()
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
