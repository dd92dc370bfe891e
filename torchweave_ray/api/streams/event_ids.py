"""Ids of a stream's events: which stream, how many events, and how far each choice has come.

An id counts what was generated, not how it was cut into events: another run of the same request
comes by the same place, whatever its steps were. Knows no protocol.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import ChoiceDelta, FinishReason

PARAM = "Last-Event-ID"
_ENDS = (FinishReason.STOP, FinishReason.LENGTH)
"""What another run ends with, too; "abort" and "error" it need not."""
_PLACE = r"(?:-|\d{1,9}\.\d{1,9}\.\d{1,10}e?)"
_EVENT_ID = re.compile(
    rf"([0-9a-f]{{32}}):(\d{{1,9}}):({_PLACE}(?:,{_PLACE})*)"
    r"(?::(\d{1,4})\.(\d{1,9})\.(\d{1,9})\.(\d{1,9})|:end\.(\d{1,9}))?"
)


@dataclass(slots=True)
class Place:
    """How far one choice has come."""

    num_tokens: int = 0
    num_chars: int = 0
    checksum: int = 0
    """CRC-32 of its text: a run that says something else is noticed."""
    has_begun: bool = False
    """Something was said of it, be it nothing."""
    has_ended: bool = False

    def advance(self, delta: ChoiceDelta) -> None:
        self.has_begun = True
        self.num_tokens += len(delta.token_ids)
        if text := delta.text:
            self.num_chars += len(text)
            self.checksum = crc32(text.encode(), self.checksum)
        if delta.finish_reason in _ENDS:
            self.has_ended = True

    def __str__(self) -> str:
        if not self.has_begun:
            return "-"
        return f"{self.num_tokens}.{self.num_chars}.{self.checksum}{'e' if self.has_ended else ''}"


@dataclass(frozen=True, slots=True)
class Part:
    """News of one choice, which several events may show."""

    choice: int
    num_tokens: int
    num_chars: int


@dataclass(frozen=True, slots=True)
class EventId:
    """What the client has."""

    stream_id: str
    num_events: int
    places: tuple[Place, ...]
    part: Part | None = None
    """The client has only the first `num_in_part` events of this, which leads to `places`."""
    is_in_end: bool = False
    """The same of the events that end the stream."""
    num_in_part: int = 0


def parse_event_id(text: str) -> EventId:
    """Raises InvalidRequest."""
    found = _EVENT_ID.fullmatch(text)
    if found is None:
        raise InvalidRequest(f"{PARAM} is not the id of an event of ours", PARAM)
    stream_id, num_events, places, choice, tokens, chars, in_part, in_end = found.groups()
    part = None if choice is None else Part(int(choice), int(tokens), int(chars))
    event_id = EventId(
        stream_id,
        int(num_events),
        tuple(map(_parse_place, places.split(","))),
        part,
        in_end is not None,
        int(in_part or in_end or 0),
    )
    _check(event_id)
    return event_id


def does_not_fit() -> InvalidRequest:
    return InvalidRequest(
        f"{PARAM} does not fit: this stream does not come by that place", PARAM, "does_not_fit"
    )


def _parse_place(text: str) -> Place:
    if text == "-":
        return Place()
    tokens, chars, checksum = text.removesuffix("e").split(".")
    return Place(int(tokens), int(chars), int(checksum), True, text.endswith("e"))


def _check(event_id: EventId) -> None:
    part, fits = event_id.part, event_id.num_in_part <= event_id.num_events
    if part is not None:
        fits = fits and part.choice < len(event_id.places)
        place = event_id.places[part.choice] if fits else Place()
        fits = fits and part.num_tokens <= place.num_tokens and part.num_chars <= place.num_chars
    if event_id.is_in_end:
        fits = fits and all(place.has_ended for place in event_id.places)
    if not fits:
        raise does_not_fit()


@dataclass(slots=True)
class EventIds:
    """Counts the events of one stream, and writes its id before each."""

    stream_id: str
    places: list[Place]
    num_events: int = 0
    _shown: list[str] = field(init=False)
    _head: str = field(init=False)
    """What every id begins with."""

    def __post_init__(self) -> None:
        self._shown = [str(place) for place in self.places]
        self._head = f"id: {self.stream_id}:"

    def advance(self, choice: int, delta: ChoiceDelta) -> None:
        place = self.places[choice]
        place.advance(delta)
        self._shown[choice] = str(place)

    def mark_one(self, event: bytes) -> bytes:
        """An event that shows all of a part. Most do, so this is `_id` without its calls."""
        self.num_events = number = self.num_events + 1
        shown = self._shown
        places = shown[0] if len(shown) == 1 else ",".join(shown)
        return f"{self._head}{number}:{places}\n".encode() + event

    def mark(self, chunk: bytes, part: Part, num_had: int = 0) -> bytes:
        """The events that show a part, without the first `num_had`: the last needs no more than
        the place that the part led to."""
        if not chunk:
            return chunk
        inner = f":{part.choice}.{part.num_tokens}.{part.num_chars}."
        events = _cut(chunk)
        heads = [self._id(f"{inner}{i}") for i in range(1, len(events))]
        return _joined([*heads, self._id()], events, num_had)

    def mark_end(self, chunk: bytes, num_had: int = 0) -> bytes:
        """The events that end a stream; of one that did not come to its own end they have none."""
        if not all(place.has_ended for place in self.places):
            return chunk
        events = _cut(chunk)
        return _joined([self._id(f":end.{i}") for i in range(1, len(events) + 1)], events, num_had)

    def _id(self, suffix: str = "") -> str:
        self.num_events += 1
        return f"{self._head}{self.num_events}:{','.join(self._shown)}{suffix}\n"


def _cut(chunk: bytes) -> list[bytes]:
    """Its events. No event has an empty line in it."""
    return [event + b"\n\n" for event in chunk.split(b"\n\n")[:-1]]


def _joined(heads: Sequence[str], events: Sequence[bytes], num_had: int) -> bytes:
    if num_had > len(events):
        raise does_not_fit()
    both = zip(heads[num_had:], events[num_had:], strict=True)
    return b"".join(head.encode() + event for head, event in both)
