"""Writers around a protocol's writer: one puts an id on every event, one leaves out what the
client of a stream that was opened again has already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torchweave_ray.api.streams.event_ids import EventId, EventIds, Part, Place, does_not_fit
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import ChoiceDelta, RequestOutput, TokenLogprobs, merge_outputs

if TYPE_CHECKING:
    from torchweave_ray.api.sse import Writer

_NOTHING = Part(0, 0, 0)
PromptLogprobs = tuple[TokenLogprobs | None, ...]


@runtime_checkable
class CountingWriter(Protocol):
    """Its events hold their own number."""

    num_events: int


class NumberedWriter:
    """A `Writer`."""

    def __init__(self, writer: Writer, ids: EventIds, n: int) -> None:
        """`n`: choices of each prompt."""
        self._writer = writer
        self._ids = ids
        self._n = n

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        """A choice at a time, so that each event's place is a choice's."""
        if len(output.deltas) == 1:
            return self._part(prompt_index, output)
        if not output.deltas:
            return self._ids.mark(self._writer.output(prompt_index, output), _NOTHING)
        first, *between, last = output.deltas
        parts = [
            RequestOutput(output.request_id, (first,), prompt_logprobs=output.prompt_logprobs),
            *(RequestOutput(output.request_id, (delta,)) for delta in between),
            RequestOutput(output.request_id, (last,), output.usage, output.timings),
        ]
        return b"".join(self._part(prompt_index, part) for part in parts)

    def end(self) -> bytes:
        return self._ids.mark_end(self._writer.end())

    def error(self, error: RequestError) -> bytes:
        """Without an id: a client that comes again goes on from what it had before."""
        return self._writer.error(error)

    def _part(self, prompt_index: int, output: RequestOutput) -> bytes:
        delta = output.deltas[0]
        choice = prompt_index * self._n + delta.index
        chunk = self._writer.output(prompt_index, output)
        self._ids.advance(choice, delta)
        if chunk.count(b"\n\n") == 1:
            return self._ids.mark_one(chunk)
        return self._ids.mark(chunk, Part(choice, len(delta.token_ids), len(delta.text)))


class CatchingUp:
    """A `Writer` of a run that begins again: silent up to `last`, then as a NumberedWriter.

    What one choice says beyond its place waits until all have come to theirs.
    """

    def __init__(self, writer: Writer, last: EventId, n: int) -> None:
        self._writer = writer
        self._last = last
        self._n = n
        self._ids = EventIds(last.stream_id, [replace(place) for place in last.places])
        self._numbered = NumberedWriter(writer, self._ids, n)
        self._places = [Place() for _ in last.places]
        self._num_behind = sum(place != Place() for place in last.places)
        self._pieces: list[ChoiceDelta] = []
        """Of what the client has some events of."""
        self._prompt_logprobs: PromptLogprobs | None = None
        """Not shown to the writer yet: they go with what it hears first."""
        self._held: list[tuple[int, RequestOutput]] = []
        self._has_caught_up = False

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        if self._has_caught_up:
            return self._numbered.output(prompt_index, output)
        self._prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        heads, rests = [], []
        for delta in output.deltas:
            head, rest = self._passed(prompt_index * self._n + delta.index, delta)
            heads += [] if head is None else [head]
            rests += [] if rest is None else [rest]
        if heads:
            self._say(prompt_index, heads)
        if rests or output.is_last:
            self._held.append((prompt_index, replace(output, deltas=tuple(rests))))
        return b"" if self._num_behind else self._catch_up()

    def end(self) -> bytes:
        shown = b""
        if not self._has_caught_up:
            if self._num_behind:
                raise does_not_fit()
            shown = self._catch_up()
        num_had = self._last.num_in_part if self._last.is_in_end else 0
        return shown + self._ids.mark_end(self._writer.end(), num_had)

    def error(self, error: RequestError) -> bytes:
        return self._writer.error(error)

    def _say(self, prompt_index: int, deltas: Sequence[ChoiceDelta]) -> bytes:
        scores, self._prompt_logprobs = self._prompt_logprobs, None
        output = RequestOutput("", tuple(deltas), prompt_logprobs=scores)
        return self._writer.output(prompt_index, output)

    def _passed(
        self, choice: int, delta: ChoiceDelta
    ) -> tuple[ChoiceDelta | None, ChoiceDelta | None]:
        """What the client has of it, and what it lacks; neither is the part it has begun with."""
        place, goal, part = self._places[choice], self._last.places[choice], self._last.part
        if place == goal:
            return None, delta
        if part is None or part.choice != choice:
            head, rest = _split(delta, place, goal)
            self._move(choice, head, rest)
            return head, rest
        tokens, chars = goal.num_tokens - part.num_tokens, goal.num_chars - part.num_chars
        start = Place(tokens, chars, has_begun=bool(tokens or chars))
        head, rest = _split(delta, place, start)
        if head is not None:
            place.advance(head)
        piece = None
        if rest is not None:
            piece, rest = _split(rest, place, goal)
            self._pieces += [] if piece is None else [piece]
        self._move(choice, piece, rest)
        return head, rest

    def _move(self, choice: int, head: ChoiceDelta | None, rest: ChoiceDelta | None) -> None:
        place, goal = self._places[choice], self._last.places[choice]
        if head is not None:
            place.advance(head)
        if place == goal:
            self._num_behind -= 1
        elif rest is not None or place.has_ended:
            raise does_not_fit()

    def _catch_up(self) -> bytes:
        """The first that is shown: what the client lacks of the part it has begun with, and what
        was said meanwhile."""
        self._has_caught_up = True
        last = self._last
        self._ids.num_events = last.num_events - last.num_in_part
        if last.part is None:
            self._say(0, ())  # what opens a stream was shown, whatever opened it
            self._count()
            shown = b""
        else:
            self._count()
            index, pieces = 0, self._pieces
            if pieces:
                index = last.part.choice // self._n
                merged = merge_outputs([RequestOutput("", (piece,)) for piece in pieces])
                pieces = list(merged.deltas)
            shown = self._ids.mark(self._say(index, pieces), last.part, last.num_in_part)
        for prompt_index, output in self._held:
            shown += self._numbered.output(prompt_index, output)
        return shown

    def _count(self) -> None:
        if isinstance(self._writer, CountingWriter):
            self._writer.num_events = self._ids.num_events


def _split(
    delta: ChoiceDelta, place: Place, goal: Place
) -> tuple[ChoiceDelta | None, ChoiceDelta | None]:
    """Up to the goal, and beyond it; a choice's end belongs to a goal that has ended."""
    if goal.has_ended:
        return delta, None
    tokens = max(goal.num_tokens - place.num_tokens, 0)
    chars = max(goal.num_chars - place.num_chars, 0)
    if not (tokens or chars) and (place.has_begun or not goal.has_begun):
        return None, delta
    has_more = len(delta.token_ids) > tokens or len(delta.text) > chars
    if not has_more and delta.finish_reason is None:
        return delta, None
    scores = delta.logprobs
    head = replace(
        delta,
        token_ids=delta.token_ids[:tokens],
        text=delta.text[:chars],
        logprobs=None if scores is None else scores[:tokens],
        finish_reason=None,
        stop_reason=None,
        error=None,
    )
    rest = replace(
        delta,
        first_index=delta.first_index + len(head.token_ids),
        token_ids=delta.token_ids[tokens:],
        text=delta.text[chars:],
        logprobs=None if scores is None else scores[tokens:],
    )
    return head, rest
