"""Text of one sequence as it grows: incremental decoding and stop strings.

Text is held back exactly as long as a stop string may still match. Knows no ids of end tokens.
"""

from __future__ import annotations

from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import TokenDecoder


class TextStream:
    def __init__(self, decoder: TokenDecoder, sampling: SamplingParams) -> None:
        self.matched: str | None = None
        """The stop string that ended the text."""
        self._decoder = decoder
        self._stop = sampling.stop
        self._min_tokens = sampling.min_tokens
        self._include_stop = sampling.include_stop_str_in_output
        self._num_tokens = 0
        self._tail = ""  # text that is decoded and not released
        self._end_of_match = 0
        self._longest = max((len(s) for s in sampling.stop), default=0)

    def push(self, token_id: int) -> str:
        """The text that may be released after this token; `matched` is set when it is the last."""
        self._num_tokens += 1
        return self._extend(self._decoder.step(token_id))

    def flush(self, end_token_id: int | None = None) -> str:
        """The rest, when the sequence ends; nothing follows a matched stop string.

        `end_token_id`: a stop token whose text is wanted; it can match no stop string any more.
        """
        if self.matched is not None:
            return ""
        if end_token_id is not None:
            self._tail += self._decoder.step(end_token_id)
        released, self._tail = self._tail + self._decoder.flush(), ""
        return released

    def _extend(self, piece: str) -> str:
        old_length = len(self._tail)
        self._tail += piece
        if not self._stop:
            cut = len(self._tail)
        elif self._num_tokens >= self._min_tokens and self._match(old_length) is not None:
            cut = self._end_of_match
        else:
            cut = len(self._tail) - self._num_held_back()
        released, self._tail = self._tail[:cut], self._tail[cut:]
        return released

    def _match(self, old_length: int) -> str | None:
        """The stop string that the newest text completed first; of several the longest."""
        found = []
        for stop in self._stop:
            start = self._tail.find(stop, max(0, old_length - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if found:
            end, start, self.matched = min(found)
            self._end_of_match = end if self._include_stop else start
        return self.matched

    def _num_held_back(self) -> int:
        """Length of the longest end of the tail that begins a stop string."""
        for size in range(min(self._longest - 1, len(self._tail)), 0, -1):
            end = self._tail[-size:]
            if any(len(s) > size and s.startswith(end) for s in self._stop):
                return size
        return 0
