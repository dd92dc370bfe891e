"""Token ids to text, a token at a time. Knows nothing of files and templates."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel


class TokenBytes(dict[int, bytes]):
    """Token id to the UTF-8 bytes that it adds, filled at first use.

    Holds for tokenizers whose text is the bytes of its tokens in a row: byte-level BPE, and
    SentencePiece-like ones with byte fallback. The latter's own decoder turns a whole run of byte
    tokens into U+FFFD when one is wrong; here only the wrong ones are, so text once sent stands.
    """

    def __init__(self, backend: tokenizers.Tokenizer, form: Mapping[str, Any]) -> None:
        super().__init__()
        self._backend = backend
        self._byte_of_char = _byte_of_char() if form["type"] == "ByteLevel" else None
        self._replacements: list[tuple[str, str]] = form.get("replacements", [])
        self._byte_fallback: bool = form.get("byte_fallback", False)
        self.texts: dict[int, str] = {}
        """Text of a token that neither begins nor ends within a character, once it was seen."""
        self.num_stripped: int = form.get("num_stripped", 0)
        """So many spaces are dropped at the start of a text."""

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> TokenBytes | None:
        """None when the text of this tokenizer is not the bytes of its tokens in a row."""
        decoder = json.loads(backend.to_str()).get("decoder") or {"type": None}
        if decoder["type"] == "ByteLevel":
            return cls(backend, decoder)
        form = _sequence_form(decoder.get("decoders", []))
        return cls(backend, form) if form is not None else None

    def __missing__(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        raw = self[token_id] = b"" if token is None else self._encode(token)
        return raw

    def _encode(self, token: str) -> bytes:
        if self._byte_of_char is not None:
            try:
                return bytes([self._byte_of_char[char] for char in token])
            except KeyError:  # an added token is plain text
                return token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_fallback and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                return token.encode()
        return token.encode()


class ByteDecoder:
    """UTF-8, a token at a time. Exact: a character is given as soon as its last byte came."""

    __slots__ = ("_is_between", "_num_stripped", "_skipped", "_texts", "_token_bytes", "_utf8")

    def __init__(self, token_bytes: TokenBytes, skipped: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._texts = token_bytes.texts
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_stripped = token_bytes.num_stripped
        self._is_between = self._num_stripped == 0
        """No part of a character waits and nothing is left to strip: the usual state."""

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if self._is_between and (known := self._texts.get(token_id)) is not None:
            return known
        text = self._utf8.decode(self._token_bytes[token_id])
        was_between = self._is_between
        if self._num_stripped and text:
            text = self._strip(text)
        self._is_between = not self._num_stripped and not self._utf8.getstate()[0]
        if was_between and self._is_between:
            self._texts[token_id] = text
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _strip(self, text: str) -> str:
        stripped = text.lstrip(" ")
        num_dropped = min(len(text) - len(stripped), self._num_stripped)
        self._num_stripped = 0 if stripped else self._num_stripped - num_dropped
        return text[num_dropped:]


class WindowDecoder:
    """For every other tokenizer: decode the last piece with and without the new tokens.

    The piece before gives the new one its context (a space between words, "##" joined on).
    """

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._ids: list[int] = []
        self._num_given = 0

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._ungiven()
        if not text or text.endswith("\ufffd"):
            return ""
        del self._ids[: self._num_given]
        self._num_given = len(self._ids)
        return text

    def flush(self) -> str:
        text = self._ungiven()
        self._num_given = len(self._ids)
        return text

    def _ungiven(self) -> str:
        given: str = self._backend.decode(self._ids[: self._num_given], skip_special_tokens=False)
        text: str = self._backend.decode(self._ids, skip_special_tokens=False)
        return text[len(given) :]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert table.keys() == set(ByteLevel.alphabet())
    return table


def _sequence_form(decoders: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Replace*, ByteFallback, Fuse and Strip of leading spaces, as Llama 2 and Gemma have them."""
    form: dict[str, Any] = {"type": "Sequence", "replacements": []}
    for decoder in decoders:
        match decoder:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                form["replacements"].append((old, new))
            case {"type": "ByteFallback"}:
                form["byte_fallback"] = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                form["num_stripped"] = start
            case _:
                return None
    return form if "byte_fallback" in form else None
