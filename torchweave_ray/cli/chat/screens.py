"""Where a chat's answers appear: Markdown on a terminal, plain text or JSON lines in a pipe."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

REFRESHES_A_SECOND = 12


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended, and its counts where the server gave them."""

    text: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    ttft_s: float | None
    seconds: float

    @property
    def summary(self) -> str:
        parts = (
            [] if self.finish_reason in ("stop", "length") else [self.finish_reason or "cut off"]
        )
        if self.finish_reason == "length":
            parts.append("length limit")
        if self.usage:
            tokens = self.usage["completion_tokens"]
            parts += [f"{self.usage['prompt_tokens']} prompt tokens", f"{tokens} tokens"]
            if self.ttft_s is not None and tokens > 1 and self.seconds > self.ttft_s:
                parts.append(f"{(tokens - 1) / (self.seconds - self.ttft_s):.1f} tok/s")
        if self.ttft_s is not None:
            parts.append(f"first after {self.ttft_s:.2f} s")
        return f"[{', '.join(parts)}]"


class Screen(Protocol):
    def note(self, text: str) -> None:
        """What a command says."""
        ...

    def fail(self, text: str) -> None: ...

    def __enter__(self) -> Screen:
        """An answer begins."""
        ...

    def __exit__(self, *exc: object) -> None: ...

    def add(self, text: str, is_reasoning: bool) -> None: ...

    def end(self, ending: Ending) -> None: ...


class PlainScreen:
    """Text on stdout as it comes; everything else on stderr."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def fail(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr)

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to put back."""

    def add(self, text: str, is_reasoning: bool) -> None:
        if not is_reasoning:
            print(text, end="", flush=True)

    def end(self, ending: Ending) -> None:
        print(flush=True)
        print(ending.summary, file=sys.stderr)


class JsonScreen(PlainScreen):
    """One JSON object an answer."""

    def add(self, text: str, is_reasoning: bool) -> None:
        """It comes whole."""

    def end(self, ending: Ending) -> None:
        times = {"ttft_s": ending.ttft_s, "seconds": round(ending.seconds, 4)}
        answer = {"content": ending.text, "finish_reason": ending.finish_reason}
        print(json.dumps(answer | {"usage": ending.usage} | times), flush=True)


class MarkdownScreen:
    """Finished blocks are printed for good, the one that grows is drawn anew."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._text = ""
        self._live = self._new_live()

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    def fail(self, text: str) -> None:
        self._console.print(text, style="red", markup=False)

    def __enter__(self) -> MarkdownScreen:
        self._text = ""
        self._live = self._new_live()
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        rest, self._text = self._text, ""
        self._live.stop()
        if rest.strip():
            self._print(rest)

    def add(self, text: str, is_reasoning: bool) -> None:
        if is_reasoning:
            self._console.print(text, style="dim italic", end="", markup=False)
            return
        finished, self._text = split_blocks(self._text + text)
        if finished.strip():
            self._print(finished)

    def end(self, ending: Ending) -> None:
        self._console.print(ending.summary, style="dim", markup=False)

    def _new_live(self) -> Live:
        from rich.live import Live

        return Live(
            console=self._console,
            get_renderable=self._growing,
            refresh_per_second=REFRESHES_A_SECOND,
            transient=True,
            vertical_overflow="crop",
        )

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        self._console.print(Markdown(text.strip("\n")))
        self._console.print()

    def _growing(self) -> RenderableType:
        from rich.markdown import Markdown

        return Markdown(self._text)


def split_blocks(text: str) -> tuple[str, str]:
    """(what no later text can change, the rest): cut behind the last blank line that is not inside
    a fence or before an indented line."""
    cut, fence, lines = 0, "", text.split("\n")
    at = 0
    for number, line in enumerate(lines):
        mark = line.strip()[:3]
        if mark in ("```", "~~~"):
            fence = "" if mark == fence else fence or mark
        at += len(line) + 1
        follows = lines[number + 1] if number + 1 < len(lines) else ""
        if not line.strip() and not fence and follows and not follows[0].isspace():
            cut = at
    return text[:cut], text[cut:]
