"""A walk over all commands: help, --json, exit statuses, and errors that a person can read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.tiny import make_checkpoint
from torchweave_ray.cli import main
from torchweave_ray.cli.app import build_app

NO_RESULT = ("serve", "keys add", "keys revoke")
"""Runs until it is stopped; says one word."""
NO_SERVER = "http://127.0.0.1:9"


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield words, command
        return
    for name, each in below.items():
        yield from _commands(each, (*words, name))


COMMANDS = dict(_commands(get_command(build_app())))


def test_the_walk_reaches_all_of_them() -> None:
    assert len(COMMANDS) >= 21
    assert ("bench", "serving") in COMMANDS
    assert ("artifact", "gc") in COMMANDS


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_explains_itself(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.help
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{' '.join(words)} {parameter.name}"


def test_a_group_lists_its_commands() -> None:
    result = CliRunner().invoke(build_app(), ["bench", "--help"])
    assert result.exit_code == 0
    for words in COMMANDS:
        assert words[0] != "bench" or words[1] in result.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("torchweave do", {"doctor"}),
        ("torchweave artifact ", {"show", "verify", "diff", "gc"}),
        ("torchweave doctor --j", {"--json"}),
        ("torchweave serve --recipe smollm2-135m-", {"smollm2-135m-int4", "smollm2-135m-int8"}),
        ("torchweave artifact verify ", {"tiny"}),
        ("torchweave bench serving --workload ", {"random", "shared-prefix", "multi-turn"}),
    ],
)
def test_a_shell_completes(line: str, offered: set[str], tmp_path: Path) -> None:
    """As the script that --install-completion writes asks for it."""
    for name in ("tiny", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny/manifest.json").write_text("{}")
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    asked = os.environ | words | {"_TORCHWEAVE_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['torchweave']; from torchweave_ray.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=asked | {"ARTIFACT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (set(ran.stdout.split()), ran.stderr) == (offered, "")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_with_a_result_gives_it_as_json(words: tuple[str, ...]) -> None:
    names = {name for p in COMMANDS[words].params for name in p.opts}
    assert "--json" in names or " ".join(words) in NO_RESULT


def _run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str
) -> tuple[int, str, str]:
    """As a shell would: exit status, stdout, stderr. Anything but an exit fails the test."""
    monkeypatch.setattr(sys, "argv", ["torchweave", *args])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("generate hi --model nothing", "it is no recipe's name either"),
        ("chat --model nothing", "it is no recipe's name either"),
        (f"chat --url {NO_SERVER}", "no server at"),
        ("optimize nothing", "smollm2-135m-int8"),
        ("optimize none/recipe.yaml", "cannot read recipe"),
        ("batch none.jsonl out.jsonl", "cannot read none.jsonl"),
        ("artifact show nothing", "no artifact is called 'nothing'"),
        ("artifact verify nothing", "no artifact is called 'nothing'"),
        ("artifact diff one two", "no artifact is called 'one'"),
        ("keys list --file none.yaml", "none.yaml"),
        (f"bench serving --url {NO_SERVER}", "no server at"),
        (f"bench serving --url {NO_SERVER} --workload zufall", "random, shared-prefix, multi-turn"),
        ("bench throughput --model nothing", "it is no recipe's name either"),
        ("bench throughput --engine none.yaml", "cannot read none.yaml"),
        (f"bench prefix --url {NO_SERVER}", "no server at"),
        ("bench interference --url localhost", "not an http:// or https:// address"),
        ("bench routing --model nothing", "it is no recipe's name either"),
        ("bench startup --model nothing", "it is no recipe's name either"),
        ("bench plot none.json", "cannot read none.json"),
        ("bench compare none.json none.json", "cannot read none.json"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_1(
    args: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARTIFACT_MODEL_DIR", raising=False)
    monkeypatch.setenv("ARTIFACT_DIR", str(tmp_path))
    code, out, err = _run(monkeypatch, capsys, *args.split())
    assert (code, out) == (1, "")
    (line,) = (line for line in err.splitlines() if line.strip())
    assert line.startswith("error: ")
    assert said in line


def test_a_port_that_is_taken_is_said_before_ray_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "torchweave_ray.cli", "serve", "--host", "127.0.0.1"]
        ran = subprocess.run([*command, "--port", port], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "Ray" not in ran.stderr
    *_, last = ran.stderr.splitlines()
    assert last.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use; ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("frobnicate", "No such command"),
        ("bench servin", "Did you mean 'serving'?"),
        ("doctor --jsn", "--json"),
        ("doctor --port 99999", "65535"),
        ("serve --port 0", "--port"),
        ("generate", "Missing argument"),
        ("artifact gc", "--keep"),
        ("bench startup --measure nothing", "first-token, ready, memory"),
        ("bench transport --routes nothing", "haproxy+bus"),
        ("bench kernels --formats nothing", "int8-group32"),
        ("bench kernels --model nothing", "smollm2-135m"),
        ("bench plot a.json --formats gif --out b", "png, svg"),
        ("chat --url http://127.0.0.1:9 --engine a.yaml", "--engine"),
    ],
)
def test_what_is_misspelt_is_named_with_status_2(
    args: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(monkeypatch, capsys, *args.split())
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("args", "keys"),
    [
        ("artifact show", {"store", "artifacts"}),
        ("artifact gc --keep 1", {"store", "dry_run", "freed_bytes", "artifacts", "unfinished"}),
        ("doctor --no-measure", {"python", "memory", "port", "origin"}),
        pytest.param("optimize model", {"artifact"}, marks=pytest.mark.slow),
        ("keys list", {"keys"}),
        (
            "bench kernels --model smollm2-135m --formats int8 --rows 1 --seconds 0",
            {"read_gbyte_s"},
        ),
    ],
)
def test_results_are_json_and_nothing_else(
    args: str,
    keys: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARTIFACT_MODEL_DIR", raising=False)
    monkeypatch.setenv("ARTIFACT_DIR", str(tmp_path / "store"))
    if "model" in args.split():
        make_checkpoint(tmp_path / "model")
    if args.startswith("keys"):
        assert _run(monkeypatch, capsys, "keys", "add", "ours")[0] == 0
    code, out, err = _run(monkeypatch, capsys, *args.split(), "--json")
    assert code == 0, err
    values = [json.loads(line) for line in out.splitlines()]
    assert keys <= values[0].keys()
    if args.startswith("bench"):
        assert err == ""
    else:
        assert len(values) == 1
