"""A conversation: what was said, the parameters, and the commands that begin with a slash.

Knows no terminal: commands return what is to be shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torchweave_ray.errors import TorchWeaveError

Message = dict[str, str]

HELP = """\
/system [TEXT]       the system message: set it, or show it; /system - takes it away
/params [NAME=VALUE] sampling: set (temperature=0.7 max_tokens=200), take away (seed=), or show
/history             what was said so far
/retry               answer the last message again
/reset               forget what was said; system message and parameters stay
/help                this list
/exit                leave; so does Ctrl-D

Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""
FIXED = ("model", "messages", "stream", "stream_options", "n")
"""Of a request: not for /params."""


class CommandError(TorchWeaveError):
    """A command that cannot be followed, in words."""


class Leave(Exception):
    """/exit."""


@dataclass(slots=True)
class Conversation:
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self.turns]

    def body(self, model: str) -> dict[str, Any]:
        """Of the request for the next answer."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": model, "messages": self.messages, **options, **self.params}

    def say(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def note_answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """The last message, of which nothing came."""
        self.turns.pop()

    def run(self, line: str) -> str | None:
        """A slash command: what to show, or None where the last message is to be answered again.

        Raises CommandError, and Leave.
        """
        name, _, rest = line[1:].partition(" ")
        command = _COMMANDS.get(name)
        if command is None:
            close = get_close_matches(name, _COMMANDS, 1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists them"
            raise CommandError(f"there is no /{name}: {hint}")
        return command(self, rest.strip())

    def _system(self, text: str) -> str:
        if text:
            self.system = None if text == "-" else text
        return f"system: {self.system}" if self.system else "no system message"

    def _params(self, text: str) -> str:
        changed = dict(self.params)
        for word in text.split():
            name, equals, value = word.partition("=")
            if not equals or not name:
                raise CommandError(f"{word!r}: NAME=VALUE, such as temperature=0.7")
            if name in FIXED:
                raise CommandError(f"{name} is not a parameter of a chat")
            changed.pop(name, None)
            if value:
                changed[name] = _value(value)
        self.params = changed
        words = [f"{name}={json.dumps(value)}" for name, value in changed.items()]
        return " ".join(words) or "no parameters: the model's own"

    def _history(self, _: str) -> str:
        return (
            "\n".join(f"{m['role']}: {m['content']}" for m in self.messages) or "nothing was said"
        )

    def _retry(self, _: str) -> None:
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise CommandError("nothing was said")

    def _reset(self, _: str) -> str:
        self.turns.clear()
        return "forgotten"

    def _help(self, _: str) -> str:
        return HELP

    def _exit(self, _: str) -> str:
        raise Leave


_COMMANDS = {
    "system": Conversation._system,
    "params": Conversation._params,
    "history": Conversation._history,
    "retry": Conversation._retry,
    "reset": Conversation._reset,
    "help": Conversation._help,
    "exit": Conversation._exit,
    "quit": Conversation._exit,
}


def _value(text: str) -> Any:
    """JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
