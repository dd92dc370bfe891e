"""An answer's text as it grows, to its parts: reasoning, text, calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torchweave_ray.api.chat.call_parser import CallParser
from torchweave_ray.api.chat.parts import Part, Reasoning, Text
from torchweave_ray.api.chat.reasoning import ReasoningSplitter


class AnswerParser:
    """One choice's. Either may be missing; `shows_reasoning`: False drops it."""

    def __init__(
        self,
        reasoning: ReasoningSplitter | None,
        calls: CallParser | None,
        shows_reasoning: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._shows_reasoning = shows_reasoning

    @property
    def has_calls(self) -> bool:
        return self._calls is not None and self._calls.num_calls > 0

    def feed(self, text: str) -> list[Part]:
        parts: Iterable[Part] = [Text(text)] if text else []
        if self._reasoning is not None:
            parts = self._reasoning.feed(text)
        return list(self._with_calls(parts))

    def finish(self) -> list[Part]:
        """What was held back."""
        held = self._reasoning.finish() if self._reasoning is not None else ()
        parts = list(self._with_calls(held))
        return parts if self._calls is None else [*parts, *self._calls.finish()]

    def _with_calls(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            if isinstance(part, Reasoning):
                if self._shows_reasoning:
                    yield part
            elif isinstance(part, Text) and self._calls is not None:
                yield from self._calls.feed(part.text)
            else:
                yield part


NewParser = Callable[[int], AnswerParser]
"""By choice: the same for the same answer."""
