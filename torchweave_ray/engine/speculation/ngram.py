"""Prompt lookup: guesses from the sequence's own tokens, without a second model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as TokenIds

from torchweave_ray.config import SpeculationConfig
from torchweave_ray.engine.sequence import Sequence
from torchweave_ray.engine.speculation.drafter import Round, Wanted


class NgramProposer:
    """Prompt lookup: what followed the last tokens when they stood in this sequence before.

    Of the longest run of tokens that did, the latest place. (A. Saxena, Prompt Lookup Decoding,
    2023.)
    """

    method = "ngram"
    acceptance = 0.5
    share = 0.0
    """It takes no steps of its own."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._sizes = range(config.max_ngram, config.min_ngram - 1, -1)
        self._known: dict[int, array[int]] = {}
        """By seq_id, its tokens as far as they were read."""

    def lag(self, seq: Sequence, end: int) -> int:
        return 0

    def propose(self, wanted: TokenIds[Wanted]) -> list[list[int]]:
        return [self._guesses(each) for each in wanted]

    def release(self, seq_id: int) -> None:
        self._known.pop(seq_id, None)

    def take_rounds(self) -> list[Round]:
        return []

    def forget_cache(self) -> None:
        """There is none."""

    def close(self) -> None:
        self._known.clear()

    def _guesses(self, wanted: Wanted) -> list[int]:
        known = self._known.setdefault(wanted.seq.seq_id, array("i"))
        known.extend(wanted.seq.token_ids[len(known) : wanted.end])
        text = known.tobytes()  # bytes are searched at memory speed
        for size in self._sizes:
            if len(known) > size:
                found = _rfind(text, text[-size * known.itemsize :], known.itemsize)
                if found >= 0:
                    following = known[found + size : found + size + wanted.num]
                    # A text that repeats itself goes on doing so.
                    return [following[i % len(following)] for i in range(wanted.num)]
        return []


def _rfind(text: bytes, tail: bytes, itemsize: int) -> int:
    """Where the tail stood before, in items; -1: nowhere."""
    end = len(text) - itemsize
    while (found := text.rfind(tail, 0, end)) >= 0:
        if found % itemsize == 0:
            return found // itemsize
        end = found + len(tail) - 1
    return -1
