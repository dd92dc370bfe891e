"""`torchweave chat`: commands, Markdown on a real pseudo-terminal, Ctrl-C, pipes, in process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.api.conftest import Server
from tests.cli.pseudo_terminal import terminal
from tests.fakes import Script
from tests.overload.server import until
from tests.smollm2 import staged_smollm2
from tests.tiny import make_tiny_artifact, model_options
from torchweave_ray.cli.app import build_app
from torchweave_ray.cli.chat.conversation import CommandError, Conversation, Leave
from torchweave_ray.cli.chat.screens import split_blocks
from torchweave_ray.errors import Overloaded


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(started: Server) -> Server:
    started.backend.__init__()  # type: ignore[misc]
    return started


def _chat(*args: str, stdin: str) -> Result:
    return CliRunner().invoke(build_app(), ["chat", *args], input=stdin)


def test_commands_change_the_next_request_only() -> None:
    conversation = Conversation()
    assert conversation.run("/system Be brief.") == "system: Be brief."
    assert conversation.run('/params temperature=0.5 stop=["a"]') == 'temperature=0.5 stop=["a"]'
    conversation.say("Hello")
    body = conversation.body("tiny")
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert (body["temperature"], body["stop"], body["stream"]) == (0.5, ["a"], True)
    assert conversation.run("/params temperature=") == 'stop=["a"]'
    conversation.note_answer("Hi")
    assert "assistant: Hi" in str(conversation.run("/history"))
    assert conversation.run("/retry") is None
    assert conversation.messages[-1]["content"] == "Hello"
    assert conversation.run("/reset") == "forgotten"
    assert [m["role"] for m in conversation.messages] == ["system"]
    assert conversation.run("/system -") == "no system message"
    with pytest.raises(Leave):
        conversation.run("/exit")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/sytem x", "did you mean /system?"),
        ("/zzz", "/help lists them"),
        ("/params hot", "NAME=VALUE"),
        ("/params model=other", "not a parameter"),
        ("/retry", "nothing was said"),
    ],
)
def test_what_a_command_cannot_do_is_said(line: str, said: str) -> None:
    with pytest.raises(CommandError, match=said.replace("?", r"\?")):
        Conversation().run(line)


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n", ""),
        ("one\ntwo", ""),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("1. a\n\n   b\n\n2. c", "1. a\n\n   b\n\n"),
    ],
)
def test_blocks_are_finished_when_nothing_can_change_them(text: str, finished: str) -> None:
    assert split_blocks(text) == (finished, text[len(finished) :])


def test_an_answer_is_markdown_on_a_terminal(server: Server, tmp_path: Path) -> None:
    server.backend.script = Script(
        pieces=("# Gra", "vity\n\n", "It **pulls**", ".\n\n- one\n- two")
    )
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    with terminal("chat", "--url", server.url, **environment) as screen:
        screen.wait_for("> ")
        screen.type("What is\\\ngravity?\n")
        said = screen.wait_for("first after")
        assert "Gravity" in said
        assert "It pulls." in said
        assert " • two" in said
        assert "**" not in said
        assert "\x1b[1mpulls" in screen.raw  # bold
        screen.type("/params temperature=0.25\n")
        screen.wait_for("temperature=0.25")
        screen.type("And?\n")
        screen.wait_for("first after")
        screen.wait_for("> ")
        screen.type("\x04")
        assert screen.process.wait(20) == 0
    first, second = server.backend.requests
    assert second.sampling.temperature == 0.25
    assert len(second.prompt_token_ids) > len(first.prompt_token_ids)
    typed = (tmp_path / "torchweave/chat_history").read_text()
    assert "And?" in typed


def test_ctrl_c_stops_the_answer_and_not_the_program(server: Server, tmp_path: Path) -> None:
    server.backend.script = Script(pieces=("Once", " more"), gates={1: asyncio.Event()})
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    with terminal("chat", "--url", server.url, **environment) as screen:
        screen.wait_for("> ")
        screen.type("Go on\n")
        screen.wait_for("Once")
        screen.type("\x03")
        screen.wait_for("stopped")
        screen.wait_for("> ")
        until(lambda: bool(server.backend.aborted))
        server.backend.script = Script()
        screen.type("And now?\n")
        screen.wait_for("Gravity pulls.")
        screen.wait_for("> ")
        screen.type("/exit\n")
        assert screen.process.wait(20) == 0
    text = server.backend.tokenizer.decode(server.backend.requests[-1].prompt_token_ids)
    assert "Once" in text  # what came before Ctrl-C stays in the conversation


def test_ctrl_c_at_the_prompt_says_how_to_leave(server: Server, tmp_path: Path) -> None:
    with terminal("chat", "--url", server.url, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("> ")
        screen.press("\x03", "Ctrl-D or /exit")
        screen.type("/exit\n")
        assert screen.process.wait(20) == 0


def test_a_pipe_gets_text_or_json(server: Server) -> None:
    plain = _chat("--url", server.url, stdin="Hi\n\nAnd?\n")
    assert plain.exit_code == 0, plain.output
    assert plain.stdout == "Gravity pulls.\nGravity pulls.\n"
    assert plain.stderr.count("prompt tokens") == 2
    answers = _chat("--url", server.url, "--json", "--max-tokens", "9", stdin="Hi\n/reset\nHi\n")
    first, second = (json.loads(line) for line in answers.stdout.splitlines())
    assert first["content"] == second["content"] == "Gravity pulls."
    assert first["usage"] == second["usage"]
    assert first["finish_reason"] == "stop"
    assert server.backend.requests[-1].sampling.max_tokens == 9


def test_a_refused_message_is_forgotten(server: Server) -> None:
    result = _chat("--url", server.url, stdin="/params top_p=7\nHi\n/params top_p=\nHi\n")
    assert result.exit_code == 1
    assert "top_p" in result.stderr
    assert result.stdout == "Gravity pulls.\n"
    assert len(server.backend.requests) == 1
    server.backend.script = Script(refusal=Overloaded("the queue is full"))
    full = _chat("--url", server.url, stdin="Hi\n")
    assert "error: the queue is full" in full.stderr


def test_an_answer_that_breaks_off_says_so(server: Server) -> None:
    server.backend.script = Script(failure=Overloaded("the engine died"))
    result = _chat("--url", server.url, stdin="Hi\n")
    assert result.exit_code == 1
    assert "Gravity pulls." in result.stdout
    assert "error: " in result.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [("localhost:8000", "not the http"), ("http://127.0.0.1:9", "no server at")],
)
def test_no_server_is_one_line(url: str, said: str) -> None:
    result = _chat("--url", url, stdin="Hi\n")
    assert result.exit_code == 1
    assert said in str(result.exception)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("models") / "tiny")


def test_in_process_it_remembers_what_was_said(artifact: Path) -> None:
    args = [*model_options(artifact), "--max-tokens", "4", "--temperature", "0", "--json"]
    result = _chat(
        *args, stdin="/params ignore_eos=true\nWhat is a star?\nAnd a sun?\n/params top_k=-7\nHi\n"
    )
    assert result.exit_code == 1
    assert "top_k" in result.stderr
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["usage"]["completion_tokens"] == second["usage"]["completion_tokens"] == 4
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 4


@pytest.mark.slow
@pytest.mark.weights
def test_the_real_model_talks_in_process(tmp_path: Path) -> None:
    environment: dict[str, Any] = {"XDG_STATE_HOME": str(tmp_path)}
    args = ("chat", "--model", str(staged_smollm2()), "--temperature", "0")
    with terminal(*args, **environment) as screen:
        screen.wait_for("> ", 120)
        screen.type("Write a long story about the sea.\n")
        screen.wait_for("sea.\r\n")
        screen.wait_for(" the ", 60)
        screen.type("\x03")
        screen.wait_for("stopped", 60)
        screen.wait_for("> ")
        screen.type("/reset\n")
        screen.type("/params max_tokens=16\n")
        screen.type("What is the capital of France?\n")
        assert "Paris" in screen.wait_for("tok/s", 60)
        screen.type("/exit\n")
        assert screen.process.wait(60) == 0
