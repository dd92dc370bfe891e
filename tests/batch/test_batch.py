"""`torchweave batch`: the file format, resuming, order, and errors; a tiny engine and a fake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.tiny import make_tiny_artifact, model_options
from torchweave_ray.batch.journal import Journal
from torchweave_ray.batch.lines import BadLine, BatchRequest, parse_line, read_lines
from torchweave_ray.cli.app import build_app
from torchweave_ray.errors import ConfigError

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("models") / "tiny")


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    return line(custom_id, **{"prompt": PROMPT, "max_tokens": 5, "seed": 1, **body})


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    path.write_text("\n".join(texts))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def run(artifact: Path, source: Path, output: Path, *args: str) -> Result:
    common = [str(source), str(output), *model_options(artifact)]
    return CliRunner().invoke(build_app(), ["batch", *common, *args])


MESSAGES = [{"role": "user", "content": "hi"}]
GOOD = [
    completion("text"),
    line("chat", "/v1/chat/completions", messages=MESSAGES, max_tokens=4),
    line("response", "/v1/responses", input="hi", max_output_tokens=4),
    line("embedding", "/v1/embeddings", input=["a", "b"]),
    line("message", "/v1/messages", messages=MESSAGES, max_tokens=4),
]
BAD: list[tuple[dict[str, Any] | str, str | int]] = [
    ("{", "invalid_json_line"),
    ("[" * 100_000, "invalid_json_line"),
    ("[]", "invalid_json_line"),
    ({"method": "POST"}, "missing_custom_id"),
    ({"custom_id": "\ud800"}, "invalid_custom_id"),
    (completion("a") | {"bodyy": {}}, "unknown_field"),
    (completion("b") | {"method": "GET"}, "invalid_method"),
    (line("c", "/v1/files"), "invalid_url"),
    (line("d") | {"body": []}, "invalid_body"),
    (completion("text"), "duplicate_custom_id"),
    (completion("e", temperature=-1), 400),
    (completion("f", stream=True), 400),
    (completion("g", prompt="\ud800"), 400),
    (completion("h", model="other"), 404),
    (completion("i", prompt="x" * (5 << 20)), 413),
]


def test_every_line_has_its_result_in_order(artifact: Path, tmp_path: Path) -> None:
    bad = [each for each, _ in BAD]
    source = write(tmp_path / "in.jsonl", GOOD[0], *bad, "", "  ", *GOOD[1:])
    ran = run(artifact, source, tmp_path / "out.jsonl")
    assert ran.exit_code == 0, ran.output
    first, *rest = results(tmp_path / "out.jsonl")
    failed, done = rest[: len(bad)], rest[len(bad) :]
    for result, (wanted, code) in zip(failed, BAD, strict=True):
        if isinstance(code, str):
            assert (result["response"], result["error"]["code"]) == (None, code)
        else:
            assert result["error"] is None
            assert result["response"]["status_code"] == code
            assert result["response"]["body"]["error"]["message"]
            assert isinstance(wanted, dict)
            assert result["custom_id"] == wanted["custom_id"]
    assert [each["custom_id"] for each in [first, *done]] == [each["custom_id"] for each in GOOD]
    assert {each["response"]["status_code"] for each in [first, *done]} == {200}
    assert first["response"]["request_id"]
    assert first["response"]["body"]["usage"]["completion_tokens"] == 5
    assert len(done[2]["response"]["body"]["data"]) == 2
    assert "line 2:" in failed[0]["error"]["message"]
    assert len({each["id"] for each in [first, *rest]}) == len(GOOD) + len(BAD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_second_run_does_nothing_and_other_lines_are_refused(
    artifact: Path, tmp_path: Path
) -> None:
    source, output = write(tmp_path / "in.jsonl", completion("a")), tmp_path / "out.jsonl"
    assert run(artifact, source, output).exit_code == 0
    before = output.read_text()
    again = run(artifact, source, output)
    assert (again.exit_code, output.read_text()) == (0, before)
    assert "complete already" in again.stderr
    write(source, completion("b"))
    refused = run(artifact, source, output)
    assert isinstance(refused.exception, ConfigError)
    assert output.read_text() == before
    assert run(artifact, source, output, "--overwrite").exit_code == 0
    assert [each["custom_id"] for each in results(output)] == ["b"]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(artifact: Path, tmp_path: Path) -> None:
    """SIGKILL twice; the results that were there are not computed again."""
    lines = [completion(f"line-{i}", max_tokens=60, ignore_eos=True, seed=i) for i in range(60)]
    source, output = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    args = [str(source), str(output), *model_options(artifact), "--concurrency", "3"]
    command = [sys.executable, "-m", "torchweave_ray.cli", "batch", *args]
    entries: list[str] = []
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            _wait_for_lines(part, len(entries) + 4, process)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        now = part.read_text().splitlines(keepends=True)
        assert now[: len(entries)] == entries
        entries = [entry for entry in now if entry.endswith("\n")]
        with part.open("a") as file:
            file.write('["torn')
    assert not output.exists()
    assert len(entries) < len(lines)
    ran = run(artifact, source, output)
    assert ran.exit_code == 0, ran.output
    assert f"{len(entries)} were done before" in ran.stderr
    done = results(output)
    assert [each["custom_id"] for each in done] == [each["custom_id"] for each in lines]
    kept = {result["custom_id"]: result for _, result in map(json.loads, entries)}
    assert {each["custom_id"]: each for each in done if each["custom_id"] in kept} == kept
    assert {each["response"]["status_code"] for each in done} == {200}


def _num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _wait_for_lines(path: Path, num: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while _num_lines(path) < num:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    with Journal(tmp_path / "out"), pytest.raises(ConfigError, match="another run"):
        Journal(tmp_path / "out").__enter__()


def test_an_edited_line_is_another_one(tmp_path: Path) -> None:
    (old,) = read_lines(write(tmp_path / "in", completion("a")))
    (new,) = read_lines(write(tmp_path / "in", completion("a", seed=2)))
    assert old.key != new.key
    assert old.custom_id == new.custom_id
    with Journal(tmp_path / "out") as journal:
        journal.add(old.key, {"custom_id": "a"})
    with Journal(tmp_path / "out") as journal:
        assert old.key in journal
        assert new.key not in journal


def test_a_body_is_passed_on_as_it_is() -> None:
    raw = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"x": NaN}}'
    wanted = parse_line(0, raw).wanted
    assert wanted == BatchRequest("/v1/completions", b'{"x": NaN}')
    assert isinstance(parse_line(0, raw + b"}").wanted, BadLine)


@pytest.fixture
def busy_server() -> Iterator[tuple[str, list[str]]]:
    """Refuses every request once, then says what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            asked.append(body)
            is_second = asked.count(body) > 1
            self.send_response(200 if is_second else 429)
            self.send_header("x-request-id", "r1")
            if not is_second:
                self.send_header("retry-after", "0")
            answer = json.dumps({"asked": self.path, "usage": {"completion_tokens": 7}}).encode()
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/here/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_is_asked_again_when_it_is_busy(
    busy_server: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = busy_server
    source = write(tmp_path / "in.jsonl", *(completion(f"{i}", seed=i) for i in range(5)))
    args = ["batch", str(source), str(tmp_path / "out.jsonl"), "--url", url]
    ran = CliRunner().invoke(build_app(), args)
    assert ran.exit_code == 0, ran.output
    done = results(tmp_path / "out.jsonl")
    assert [each["custom_id"] for each in done] == list("01234")
    assert done[0]["response"]["body"]["asked"] == "/here/v1/completions"
    assert done[0]["response"]["request_id"] == "r1"
    assert len(asked) == 10
    assert "5 done" in ran.stderr


def test_a_server_that_is_gone_stops_the_run_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchweave_ray.batch.answering.MAX_WAIT_S", 0.0)
    source = write(tmp_path / "in.jsonl", completion("a"), "{")
    output = tmp_path / "out.jsonl"
    ran = CliRunner().invoke(
        build_app(), ["batch", str(source), str(output), "--url", "http://127.0.0.1:1"]
    )
    assert "does not answer" in str(ran.exception)
    assert not output.exists()
    assert _num_lines(tmp_path / "out.jsonl.part") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--url", "ftp://x"], "not the URL of a server"),
        (["--url", "http://x", "--workers", "2"], "asks a server"),
    ],
)
def test_what_cannot_be_is_refused(args: list[str], message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", completion("a"))
    ran = CliRunner().invoke(build_app(), ["batch", str(source), str(tmp_path / "o"), *args])
    assert isinstance(ran.exception, ConfigError)
    assert message in str(ran.exception)
    ran = CliRunner().invoke(build_app(), ["batch", str(tmp_path / "no"), str(tmp_path / "o")])
    assert "no such file" in str(ran.exception)
