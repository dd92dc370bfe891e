"""Reasoning at the start of an answer, between `<think>` and `</think>`, told apart from the rest.

White space around both is dropped. Knows nothing of calls.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchweave_ray.api.chat.parts import Part, Reasoning, Text
from torchweave_ray.sampling_params import ThinkingBudget
from torchweave_ray.tokenizer import Tokenizer

OPENER, CLOSER = "<think>", "</think>"
_BEFORE, _AFTER = ("", "\n", " "), ("", "\n", "\n\n")
"""What may share tokens with a tag that is not one token itself."""


class ReasoningSplitter:
    def __init__(self, has_begun: bool) -> None:
        """`has_begun`: the prompt ends within the reasoning."""
        self._buffer = ""
        self._has_begun = has_begun
        self._is_over = False
        self._has_text = False
        """Of the kind that is being given now: leading white space is behind it."""

    def feed(self, text: str) -> Iterator[Part]:
        if self._is_over and self._has_text:
            yield Text(text)
            return
        self._buffer += text
        if not self._has_begun and not self._is_over:
            start = self._buffer.lstrip()
            if OPENER.startswith(start):
                return  # it may still come
            if start.startswith(OPENER):
                self._buffer, self._has_begun = start[len(OPENER) :], True
            else:
                self._is_over = self._has_text = True  # there is none: all stays as it is
        if not self._is_over:
            yield from self._reasoning()
        if self._is_over:
            yield from self._rest()

    def finish(self) -> Iterator[Part]:
        held, self._buffer = self._buffer, ""
        if held and self._has_begun and not self._is_over and held.strip():
            yield Reasoning(held.rstrip())
        elif held and not self._has_begun:
            yield Text(held)

    def _reasoning(self) -> Iterator[Part]:
        if not self._has_text:
            self._buffer = self._buffer.lstrip()
        reasoning, found, after = self._buffer.partition(CLOSER)
        said = reasoning.rstrip()
        if not found:
            # White space and what may begin the closer wait for what follows.
            body = self._buffer[: len(self._buffer) - _overlap(self._buffer)]
            said = body.rstrip()
        if said:
            self._has_text = True
            yield Reasoning(said)
        self._buffer = after if found else self._buffer[len(said) :]
        if found:
            self._is_over, self._has_text = True, False

    def _rest(self) -> Iterator[Part]:
        text, self._buffer = self._buffer, ""
        if not self._has_text:
            text = text.lstrip()
        if text:
            self._has_text = True
            yield Text(text)


def thinking_budget(tokenizer: Tokenizer, max_tokens: int, has_begun: bool) -> ThinkingBudget:
    """For an answer whose reasoning this tokenizer's model marks by these tags."""

    def spellings(tag: str) -> tuple[tuple[int, ...], ...]:
        texts = [f"{before}{tag}{after}" for before in _BEFORE for after in _AFTER]
        return tuple(dict.fromkeys(tuple(tokenizer.encode(text, False)) for text in texts))

    return ThinkingBudget(max_tokens, ((),) if has_begun else spellings(OPENER), spellings(CLOSER))


def _overlap(text: str) -> int:
    sizes = range(min(len(CLOSER) - 1, len(text)), 0, -1)
    return next((size for size in sizes if CLOSER.startswith(text[-size:])), 0)
