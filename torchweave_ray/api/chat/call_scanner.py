"""One object `{"name": ..., "arguments": {...}}` as it arrives, its arguments passed on at once.

Knows nothing of what stands around it.
"""

from __future__ import annotations

import json
from typing import Any

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class CallScanner:
    """`feed` until `is_done`. `name` is known before the first piece of arguments is given."""

    def __init__(self, name: str | None = None) -> None:
        """`name`: it stood before; the object is the arguments."""
        self.raw = ""
        """All that was taken."""
        self.name = name
        self.is_done = False
        self.is_broken = False
        """It is no call after all."""
        self._is_bare = name is not None
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._string_start = 0
        self._last_string = (0, 0)
        self._key: str | None = None
        self._is_value = False
        """Behind the colon of a key of the outermost object."""
        self._arguments_start: int | None = None
        self._num_given = 0
        self._arguments_end: int | None = None
        self._late_arguments: str | None = None

    def feed(self, text: str) -> tuple[str, str]:
        """(the arguments' next piece, what is behind the object)"""
        start = len(self.raw)
        self.raw += text
        for position in range(start, len(self.raw)):
            self._take(position)
            if self.is_done or self.is_broken:
                rest = self.raw[position + 1 :]
                self.raw = self.raw[: position + 1]
                return self._piece(), rest
        return self._piece(), ""

    def _take(self, position: int) -> None:
        char = self.raw[position]
        if self._in_string:
            self._take_in_string(char, position)
        elif char == '"':
            self._in_string, self._string_start = True, position
        elif char in "{[":
            is_wanted = self._depth == 1 and self._is_value and self._key in _ARGUMENTS
            if char == "{" and (is_wanted or (self._is_bare and self._depth == 0)):
                self._arguments_start = position
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1 and self._arguments_start is not None and not self._is_bare:
                self._arguments_end = self._arguments_end or position + 1
            if self._depth == 0 and self._is_bare:
                self._arguments_end, self.is_done = position + 1, True
            elif self._depth == 0:
                self._finish(self.raw[: position + 1])
        elif self._is_bare or self._depth > 1:
            pass
        elif char == ":" and not self._is_value:
            first, last = self._last_string
            self._key, self._is_value = _loaded(self.raw[first:last]), True
        elif char == ",":
            self._is_value = False
        elif char not in _SPACE and not self._is_value:
            self.is_broken = True

    def _take_in_string(self, char: str, position: int) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            if self._depth == 1 and not self._is_bare:
                self._last_string = (self._string_start, position + 1)
                if self._is_value and self._key == "name":
                    self.name = _loaded(self.raw[self._string_start : position + 1])

    def _piece(self) -> str:
        """What may be given of the arguments by now."""
        if self._late_arguments is not None:
            late, self._late_arguments = self._late_arguments, None
            return late
        if self._arguments_start is None or self.name is None or self.is_broken:
            return ""
        whole = self.raw[self._arguments_start : self._arguments_end]
        piece = whole[self._num_given :]
        self._num_given = len(whole)
        return piece

    def _finish(self, raw: str) -> None:
        try:
            call = json.loads(raw)
            name = call["name"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if not isinstance(name, str):
            self.is_broken = True
            return
        self.is_done, self.name = True, name
        if self._arguments_start is None:  # they are a string, or there are none
            self._late_arguments = _arguments(call)


def _arguments(call: dict[str, Any]) -> str:
    value: Any = next((call[key] for key in _ARGUMENTS if key in call), {})
    return value if isinstance(value, str) else json.dumps(value or {}, ensure_ascii=False)


def _loaded(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
