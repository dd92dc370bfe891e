"""`torchweave chat`: a conversation on the terminal, with a server or an engine in this process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from torchweave_ray.cli.artifact import EngineFile, artifact_of, read_engine_config
from torchweave_ray.cli.completion import recipes

if TYPE_CHECKING:
    from torchweave_ray.cli.chat.answering import Answering
    from torchweave_ray.cli.chat.conversation import Conversation
    from torchweave_ray.cli.chat.screens import Ending, Screen

T = TypeVar("T")

HISTORY_LINES = 1000


def chat(
    url: Annotated[
        str | None, typer.Option(help="A server. Default: an engine in this process.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TORCHWEAVE_API_KEY", help="Of that server.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --url one of its models. Without: an artifact's folder, or what `torchweave "
            "optimize` takes. Default: the server's first; ARTIFACT_MODEL_DIR, or SmolLM2-135M.",
            autocompletion=recipes,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of an answer. Default: what fits.", min=1)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    engine: EngineFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object an answer; for stdin from a pipe.")
    ] = False,
) -> None:
    """Talk to a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    In a pipe each line of stdin is a message, and answers are plain text. Exit status 1: one of
    them failed.
    """
    from torchweave_ray.cli.chat.conversation import Conversation

    if url is not None and engine is not None:
        raise typer.BadParameter("the server has its own", param_hint="--engine")
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = {name: value for name, value in given.items() if value is not None}
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    screen = _screen(is_terminal, as_json)
    with closing(_answering(url, model, api_key, engine)) as answering:
        conversation = Conversation(system, params)
        if is_terminal:
            screen.note(f"{answering.model}: /help lists the commands, Ctrl-D leaves")
        num_failed = talk(answering, conversation, screen, _reader(is_terminal))
    if num_failed and not is_terminal:
        raise typer.Exit(1)


def talk(
    answering: Answering,
    conversation: Conversation,
    screen: Screen,
    read: Callable[[], str],
) -> int:
    """Until `read` raises EOFError, or /exit. Returns how many messages failed."""
    from torchweave_ray.cli.chat.conversation import CommandError, Leave

    num_failed = 0
    while True:
        try:
            line = read().strip()
            with Interrupts() as interrupts:
                if not line.startswith("/"):
                    if not line:
                        continue
                    conversation.say(line)
                elif (said := conversation.run(line)) is not None:
                    screen.note(said)
                    continue
                num_failed += not _answer(answering, conversation, screen, interrupts)
        except CommandError as error:
            screen.fail(str(error))
            num_failed += 1
        except KeyboardInterrupt:
            screen.note("(Ctrl-D or /exit leaves)")
        except (EOFError, Leave):
            return num_failed


class Interrupts:
    """Ctrl-C while an answer comes: noted, and raised only where waiting for a chunk, so that
    neither the screen nor an engine is left half way."""

    def __init__(self) -> None:
        self._is_stopped = self._is_waiting = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def next_of(self, chunks: Iterator[T]) -> T | None:
        """Raises KeyboardInterrupt."""
        self._is_waiting = True
        try:
            if self._is_stopped:
                raise KeyboardInterrupt
            return next(chunks, None)
        finally:
            self._is_waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_stopped = True
        if self._is_waiting:
            raise KeyboardInterrupt


def _answer(
    answering: Answering, conversation: Conversation, screen: Screen, interrupts: Interrupts
) -> bool:
    """What came of an answer that was stopped stays; of one that failed at once, nothing."""
    from torchweave_ray.cli.chat.answering import ChatFailed

    pieces: list[str] = []
    try:
        body = conversation.body(answering.model)
        with screen, closing(answering.chunks(body)) as chunks:
            ending = _stream(chunks, screen, pieces, interrupts)
    except ChatFailed as error:
        screen.fail(str(error))
        if pieces:
            conversation.note_answer("".join(pieces))
        else:
            conversation.take_back()
        return False
    if ending.text or ending.finish_reason != "stopped":
        conversation.note_answer(ending.text)
    else:
        conversation.take_back()
    screen.end(ending)
    return True


def _stream(
    chunks: Iterator[dict[str, Any]], screen: Screen, pieces: list[str], interrupts: Interrupts
) -> Ending:
    from torchweave_ray.cli.chat.screens import Ending

    started, first_at = time.perf_counter(), None
    reason: str | None = None
    usage: dict[str, Any] | None = None
    try:
        while (chunk := interrupts.next_of(chunks)) is not None:
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                for name in ("reasoning_content", "content"):
                    if text := choice.get("delta", {}).get(name):
                        first_at = first_at or time.perf_counter()
                        screen.add(text, is_reasoning=name != "content")
                        pieces += [text] if name == "content" else []
    except KeyboardInterrupt:
        reason = "stopped"
    ttft_s = round(first_at - started, 4) if first_at else None
    return Ending("".join(pieces), reason, usage, ttft_s, time.perf_counter() - started)


def _answering(
    url: str | None, model: str | None, api_key: str | None, engine: Path | None
) -> Answering:
    from torchweave_ray.cli.chat.answering import InProcess, OverServer

    if url is not None:
        return OverServer(url, model, api_key)
    config = read_engine_config(engine)
    return InProcess(artifact_of(model), config)


def _screen(is_terminal: bool, as_json: bool) -> Screen:
    from torchweave_ray.cli.chat.screens import JsonScreen, MarkdownScreen, PlainScreen

    if as_json:
        return JsonScreen()
    return MarkdownScreen() if is_terminal else PlainScreen()


def _reader(is_terminal: bool) -> Callable[[], str]:
    """Lines of stdin; one that ends with a backslash goes on."""
    if is_terminal:
        _remember_lines()

    def read() -> str:
        line = input("> " if is_terminal else "")
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{input('  ' if is_terminal else '')}"
        return line

    return read


def _remember_lines() -> None:
    """What was typed, for the arrow keys, also of chats before: in a file of the user's own."""
    import atexit

    try:
        import readline
    except ImportError:  # Windows
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    file = state / "torchweave" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError:
        return
    readline.set_history_length(HISTORY_LINES)
    atexit.register(readline.write_history_file, file)
