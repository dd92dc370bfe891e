"""Function calls in an answer's text: where they begin and end, by a `CallFormat`.

Text is held back only as long as it may still be a call's beginning. What turns out to be no call
stays text. Knows no template.
"""

from __future__ import annotations

import re
import string
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from hashlib import sha256

from torchweave_ray.api.chat.call_scanner import CallScanner
from torchweave_ray.api.chat.parts import CallArguments, CallStart, Part, Text

_LETTERS = string.ascii_letters + string.digits
_SPACE = " \t\r\n"
_SEPARATORS = " \t\r\n,;[]"
_NAME_FIRST = re.compile(r"([A-Za-z0-9_.-]+)(?:\[ARGS\])?(?=\{)")
_MAYBE_NAME_FIRST = re.compile(r"[A-Za-z0-9_.-]+(?:\[(?:A(?:R(?:G(?:S\]?)?)?)?)?)?")


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family of models writes calls: objects of name and arguments, between markers."""

    name: str
    opener: str | None = None
    """None: an answer that begins with an object is nothing but calls."""
    closer: str | None = None
    """None: after the opener there are only calls."""
    optional_opener: str | None = None
    """May stand before an object."""
    has_short_ids: bool = False
    """Mistral's templates take ids of nine letters and digits only."""
    names_come_first: bool = False
    """`name{...}` and `name[ARGS]{...}` are calls too."""

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.opener, self.closer, self.optional_opener)))

    def call_id(self, source: str) -> str:
        """The same for the same source, so that an answer that is told again has the same ids."""
        digest = sha256(source.encode()).digest()
        if self.has_short_ids:
            return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:9])
        return f"call_{digest[:12].hex()}"


class CallParser:
    def __init__(
        self,
        form: CallFormat,
        names: frozenset[str],
        source: str,
        max_calls: int | None = None,
    ) -> None:
        """`names`: functions that may be called; another one's call stays text. `source`: what the
        calls' ids are made of, no other answer's. Calls beyond `max_calls` are dropped."""
        self.num_calls = 0
        self._form = form
        self._names = names
        self._source = source
        self._max_calls = max_calls
        self._buffer = ""
        """Not looked at yet, or not to be decided yet."""
        self._is_inside = form.opener is None
        self._region = ""
        """Since the opener or the last call; becomes text when there is no call in it."""
        self._scanner: CallScanner | None = None
        self._index: int | None = None
        """Of the call whose arguments are being passed on."""
        self._spaces = ""
        """White space that is dropped when a call follows it."""
        self._is_after_call = False

    def feed(self, text: str) -> Iterator[Part]:
        self._buffer += text
        is_stuck = False
        while self._buffer and not is_stuck:
            if self._scanner is not None:
                yield from self._scan(self._scanner)
            elif self._is_inside:
                is_stuck = yield from self._between()
            else:
                is_stuck = yield from self._outside()

    def finish(self) -> Iterator[Part]:
        """The answer is over: what is held back is text."""
        if self._index is not None:
            return  # cut off within its arguments, which were passed on
        held = self._region + (self._scanner.raw if self._scanner else "") + self._buffer
        rest = held.strip(_SEPARATORS)
        if self._is_after_call and (not rest or (self._form.closer or "").startswith(rest)):
            return
        if text := self._spaces + held:
            yield Text(text)

    def _outside(self) -> Generator[Part, None, bool]:
        """True when more must come before the rest can be decided."""
        opener = self._form.opener
        if opener is None:
            yield from self._say(self._take())
            return True
        before, found, after = self._buffer.partition(opener)
        if found:
            yield from self._say(before)
            self._region, self._buffer, self._is_inside = opener, after, True
            return False
        yield from self._say(self._take(len(self._buffer) - _overlap(self._buffer, opener)))
        return True

    def _between(self) -> Generator[Part, None, bool]:
        form = self._form
        # A marker may begin with a separator, so it is looked for first.
        self._skip(_SPACE)
        if not self._buffer:
            return True
        for marker in form.markers:
            if self._buffer.startswith(marker):
                self._region += self._take(len(marker))
                if marker == form.closer:
                    yield from self._close()
                return False
            if marker.startswith(self._buffer):
                return True
        if self._skip(_SEPARATORS):
            return not self._buffer
        stripped = self._buffer
        if stripped[0] == "{":
            self._scanner = CallScanner()
        elif form.names_come_first and (named := _NAME_FIRST.match(stripped)):
            self._region += self._take(named.end())
            self._scanner = CallScanner(named[1])
        elif form.names_come_first and _MAYBE_NAME_FIRST.fullmatch(stripped):
            return True
        else:
            yield from self._give_up()
        return False

    def _scan(self, scanner: CallScanner) -> Iterator[Part]:
        piece, self._buffer = scanner.feed(self._take())
        if piece and self._index is None and scanner.name in self._names:
            self._index = self.num_calls
            self.num_calls += 1
            self._spaces, self._is_after_call = "", True
            if self._is_wanted(self._index):
                call_id = self._form.call_id(f"{self._source}:{self._index}")
                yield CallStart(self._index, call_id, scanner.name or "")
        if piece and self._index is not None and self._is_wanted(self._index):
            yield CallArguments(self._index, piece)
        if self._index is None and (piece or scanner.is_broken):
            yield from self._give_up()
        elif scanner.is_done or scanner.is_broken:
            self._scanner, self._index, self._region = None, None, ""

    def _is_wanted(self, index: int) -> bool:
        return self._max_calls is None or index < self._max_calls

    def _close(self) -> Iterator[Part]:
        """Behind the closer there is text again."""
        assert self._form.opener is not None
        if self._region.startswith(self._form.opener):  # no call stood between the two
            yield from self._say(self._region)
        self._region, self._is_inside = "", False

    def _give_up(self) -> Iterator[Part]:
        """What was taken for a call is none."""
        raw = self._region + (self._scanner.raw if self._scanner is not None else "")
        self._scanner, self._region, self._is_inside = None, "", False
        yield from self._say(raw)

    def _say(self, text: str) -> Iterator[Part]:
        text = self._spaces + text
        if self._is_after_call:
            text = text.lstrip()
        said = text.rstrip()
        self._spaces = text[len(said) :]
        if said:
            self._is_after_call = False
            yield Text(said)

    def _skip(self, characters: str) -> bool:
        num = len(self._buffer) - len(self._buffer.lstrip(characters))
        self._region += self._take(num)
        return num > 0

    def _take(self, num: int | None = None) -> str:
        num = len(self._buffer) if num is None else num
        taken, self._buffer = self._buffer[:num], self._buffer[num:]
        return taken


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((size for size in sizes if marker.startswith(text[-size:])), 0)
