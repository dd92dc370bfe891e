"""Stop strings against a reference that looks through the whole text anew after every token."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torchweave_ray.engine.output.detokenizer import TextStream
from torchweave_ray.sampling_params import SamplingParams

LETTERS = st.text("abc", min_size=1, max_size=4)


class Pieces:
    """A TokenDecoder: token i is the i-th piece; the last one comes with flush()."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def step(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


def expected(pieces: list[str], params: SamplingParams) -> tuple[str, str | None, list[str]]:
    """(text, the stop string that ended it, text released after each token before the last)."""
    text, released = "", []
    for number, piece in enumerate(pieces, start=1):
        before, text = len(text), text + piece
        found = [
            (start + len(stop), start, stop)
            for stop in params.stop
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > before
        ]
        if found and number >= params.min_tokens:
            end, start, stop = min(found)
            return text[: end if params.include_stop_str_in_output else start], stop, released
        held = [
            size
            for stop in params.stop
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        ]
        released.append(text[: len(text) - max(held, default=0)])
    return text, None, released


@given(
    pieces=st.lists(st.text("abc", max_size=3), min_size=1, max_size=12),
    stop=st.lists(LETTERS, max_size=4),
    min_tokens=st.integers(0, 4),
    include=st.booleans(),
)
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_they_end_the_text_where_a_whole_search_does(
    pieces: list[str], stop: list[str], min_tokens: int, include: bool
) -> None:
    params = SamplingParams(
        stop=tuple(stop), min_tokens=min_tokens, include_stop_str_in_output=include
    )
    text, matched, released = expected(pieces, params)
    stream, seen = TextStream(Pieces(pieces), params), ""
    for number in range(len(pieces)):
        seen += stream.push(number)
        if stream.matched is not None:
            break
        assert seen == released[number], "held back exactly as long as a stop string may match"
    assert seen + stream.flush() == text
    assert stream.matched == matched
