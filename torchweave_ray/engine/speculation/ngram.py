"""Prompt lookup: guesses from the sequence's own tokens, without a second model."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds

from torchweave_ray.config import SpeculationConfig
from torchweave_ray.engine.speculation.drafter import DraftState


class NgramProposer:
    """Prompt lookup: what followed the last tokens when they stood in this sequence before.

    Of the longest run of tokens that did, the latest place. (A. Saxena, Prompt Lookup Decoding,
    2023.)
    """

    def __init__(self, config: SpeculationConfig) -> None:
        self._sizes = range(config.max_ngram, config.min_ngram - 1, -1)

    def propose(
        self, state: DraftState, token_ids: TokenIds[int], end: int, most: int
    ) -> list[int]:
        known = state.token_ids
        known.extend(token_ids[len(known) : end])
        text = known.tobytes()  # bytes are searched at memory speed
        for size in self._sizes:
            if len(known) > size:
                found = _rfind(text, text[-size * known.itemsize :], known.itemsize)
                if found >= 0:
                    following = known[found + size : found + size + most]
                    # A text that repeats itself goes on doing so.
                    return [following[i % len(following)] for i in range(most)]
        return []


def _rfind(text: bytes, tail: bytes, itemsize: int) -> int:
    """Where the tail stood before, in items; -1: nowhere."""
    end = len(text) - itemsize
    while (found := text.rfind(tail, 0, end)) >= 0:
        if found % itemsize == 0:
            return found // itemsize
        end = found + len(tail) - 1
    return -1
