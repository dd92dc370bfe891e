"""The command line: quick, honest exit statuses, the predecessor's flags."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.bench.fake_server import FakeServer
from torchweave_ray.cli import checks
from torchweave_ray.cli.app import build_app


def _run(*args: str) -> Result:
    return CliRunner().invoke(build_app(), list(args))


def _run_against(server: FakeServer, *args: str) -> Result:
    async def main() -> Result:
        async with server.listening() as url:
            filled = [arg.replace("URL", url) for arg in args]
            return await asyncio.to_thread(_run, *filled)

    return asyncio.run(main())


def test_help_names_every_command() -> None:
    result = _run("--help")
    assert result.exit_code == 0
    for name in ("serve", "generate", "optimize", "doctor", "bench"):
        assert name in result.output


def test_bench_prints_a_json_line_a_point() -> None:
    args = ("bench", "serving", "--url", "URL", "--concurrency", "1,2", "--requests", "2")
    result = _run_against(FakeServer(), *args)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["concurrency"] for line in lines] == [1, 2]
    assert all(line["output_tokens"] == 8 for line in lines)
    assert "tok/s" in result.stderr


def test_the_predecessors_flags_give_the_gain_of_batching() -> None:
    args = ("--sse", "URL/v1/generate", "--nobatch", "URL/v1/generate_nobatch")
    result = _run_against(
        FakeServer(), "bench", "serving", "--concurrency", "2", "--iters", "4", *args
    )
    assert result.exit_code == 0, result.output
    targets = [json.loads(line)["target"] for line in result.stdout.splitlines()]
    assert targets == ["sse", "nobatch"]
    assert "x of /v1/generate_nobatch" in result.stderr


def test_saved_results_name_work_and_origin(tmp_path: Path) -> None:
    args = ("--concurrency", "1", "--requests", "1", "--seed", "7", "--save")
    result = _run_against(
        FakeServer(), "bench", "serving", "--url", "URL", *args, "--results", str(tmp_path)
    )
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("serving-*.json")
    document = json.loads(path.read_text())
    assert document["config"]["seed"] == 7
    assert document["config"]["targets"]["completions"].endswith("/v1/completions")
    assert document["points"][0]["output_tokens"] == 4


@pytest.mark.parametrize("concurrency", ["0", "", "many", "1,,2"])
def test_bad_concurrency_names_the_option(concurrency: str) -> None:
    result = _run("bench", "serving", "--concurrency", concurrency)
    assert result.exit_code == 2
    assert "--concurrency" in result.stderr


def test_failed_requests_give_exit_status_1() -> None:
    args = ("--concurrency", "1", "--requests", "1", "--warmup", "0")
    result = _run_against(FakeServer(usage=False), "bench", "serving", "--url", "URL", *args)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == 1


def test_doctor_tells_notes_from_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARTIFACT_MODEL_DIR", raising=False)
    monkeypatch.setenv("ARTIFACT_DIR", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = _run("doctor", "--no-measure", "--json", "--port", str(port))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["port"]["status"] == "warn"
    assert found["artifact"]["status"] == "warn"
    assert {found[name]["status"] for name in ("python", "packages", "cpu", "device")} == {"ok"}


def test_a_broken_artifact_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACT_MODEL_DIR", str(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    assert "problem" in _run("doctor", "--no-measure").stdout
    result = _run("doctor", "--no-measure", "--json")
    assert result.exit_code == 1
    assert "manifest.json: not a manifest" in json.loads(result.stdout)["artifact"]["detail"]


def test_too_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MIN_MEMORY_GIB", 1e6)
    assert _run("doctor", "--no-measure").exit_code == 1


def test_our_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchweave_ray.cli import main

    argv = ["torchweave", "bench", "serving", "--url", "http://127.0.0.1:9"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no server at")


@pytest.mark.parametrize("option", ["--url", "--sse"])
def test_an_address_that_is_none_is_one_line(option: str) -> None:
    result = _run("bench", "serving", option, "localhost:8000")
    assert result.exit_code == 1
    assert "not an http:// or https:// address" in str(result.exception)


def test_the_shell_is_told_the_commands() -> None:
    """What bash asks when Tab is pressed behind `torchweave be`."""
    words = {"COMP_WORDS": "torchweave be", "COMP_CWORD": "1"}
    env = {**words, "_TORCHWEAVE_COMPLETE": "complete_bash"}
    result = CliRunner(env=env).invoke(build_app(), [], prog_name="torchweave")
    assert result.stdout.split() == ["bench"]
