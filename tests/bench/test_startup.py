"""Starts: the engine's own process for real on a tiny artifact, servers by their seams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.tiny import make_tiny_artifact
from torchweave_ray.bench import process_tree, startup
from torchweave_ray.bench.load.targets import BenchmarkError
from torchweave_ray.bench.process_tree import Memory, ProcessTree, memory_of, wait_until_calm
from torchweave_ray.bench.server_process import RunningServer, ServerFailed, started_server
from torchweave_ray.cli.app import build_app

HTTP_SERVER = """
import http.server, sys
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Ok).serve_forever()
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1024
    )


def test_the_first_token_of_a_process_by_parts(artifact: Path) -> None:
    options = {"cache": {"kv_memory": 4 << 20}, "runner": {"threads": 1}}
    line = startup.first_token(artifact, options, run=0)
    wanted = ["interpreter", "imports", "verify", "weights", "kv_cache", "first_step", "tokenizer"]
    assert list(line["parts"]) == [*wanted, "first_token"]
    assert all(seconds >= 0 for seconds in line["parts"].values())
    assert sum(line["parts"].values()) == pytest.approx(line["seconds"], abs=0.01)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="is not a folder"):
        startup.first_token(tmp_path / "nothing", {}, run=0)


def test_a_server_is_waited_for_and_stopped() -> None:
    with started_server((), program=(sys.executable, "-c", HTTP_SERVER)) as server:
        assert server.ready_s > 0
        os.kill(server.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_no_server_outlives_a_benchmark_that_is_killed() -> None:
    code = (
        "import sys, time\n"
        "from torchweave_ray.bench.server_process import started_server\n"
        "with started_server((), program=(sys.executable, '-c', sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, HTTP_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        pid = int(benchmark.stdout.readline())
        os.kill(pid, 0)
        benchmark.kill()
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead, and nobody has looked
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} still runs")


def test_a_server_that_ends_says_what_it_said() -> None:
    program = (sys.executable, "-c", "raise SystemExit('no such recipe')")
    with (
        pytest.raises(ServerFailed, match="no such recipe"),
        started_server((), program=program),
    ):
        pass


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], Any]]:
    """In place of real ones: the arguments of each, and its configuration file."""
    started: list[tuple[tuple[str, ...], Any]] = []

    @contextmanager
    def fake(arguments: Sequence[str]) -> Iterator[RunningServer]:
        first = Path(arguments[0])
        values = yaml.safe_load(first.read_text()) if first.suffix == ".yaml" else None
        started.append((tuple(arguments), values))
        yield RunningServer("http://127.0.0.1:9", os.getpid(), 1.5 + len(started))

    monkeypatch.setattr(startup, "started_server", fake)
    return started


def test_the_model_and_an_empty_app_start_alike(
    servers: list[tuple[tuple[str, ...], Any]], artifact: Path
) -> None:
    args = ["--model", str(artifact), "--measure", "ready"]
    result = CliRunner().invoke(build_app(), ["bench", "startup", *args])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(x["profile"], x["app"], x["seconds"]) for x in lines] == [
        ("default", "empty", 2.5),
        ("default", "model", 3.5),
        ("haproxy", "empty", 4.5),
        ("haproxy", "model", 5.5),
    ]
    (empty, values), (model, none), *_ = servers
    assert values["applications"][0]["import_path"] == "deployments.bench.empty_app:app"
    assert none is None
    assert model == ("--artifact", str(artifact), *empty[1:])
    assert "ready haproxy model: 5.50 s" in result.stderr


def test_memory_needs_both_replicas(
    servers: list[tuple[tuple[str, ...], Any]], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_work(url: str) -> None: ...

    monkeypatch.setattr(startup, "_little_work", no_work)
    with pytest.raises(BenchmarkError, match="0 replicas found"):
        startup.replica_memory(str(artifact))
    ((_, values),) = servers
    (model,) = values["applications"][0]["args"]["models"]
    assert (model["artifact"], model["num_replicas"]) == (str(artifact), 2)
    monkeypatch.setattr(ProcessTree, "named", lambda self, *words: [os.getpid()] * 2)
    line = startup.replica_memory(str(artifact))
    assert min(line["uss_mib"]) > 1
    assert line["kv_memory_mib"] == 32


def test_an_unknown_measure_is_refused() -> None:
    result = CliRunner().invoke(build_app(), ["bench", "startup", "--measure", "speed"])
    assert result.exit_code == 2
    assert "--measure" in result.stderr


def test_processes_are_found_by_their_command_lines(tmp_path: Path) -> None:
    for pid, parent, command in ((1, 0, b"init"), (2, 1, b"a\0b one"), (3, 2, b"a two\0one")):
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} (x) S {parent} {'0 ' * 9}0 0 0 0 20 0 1")
        (folder / "cmdline").write_bytes(command)
    assert ProcessTree([2], tmp_path).named("a", "one") == [2, 3]
    assert ProcessTree([2], tmp_path).named("two") == [3]
    assert ProcessTree([3], tmp_path).named("init") == []


def test_unique_memory_counts_private_pages_only(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    text = (
        "Rss: 900 kB\nPss: 500 kB\nPss_Dirty: 9 kB\nPrivate_Clean: 100 kB\nPrivate_Dirty: 200 kB\n"
    )
    (tmp_path / "7" / "smaps_rollup").write_text(text)
    assert memory_of(7, tmp_path) == Memory(300 * 1024, 500 * 1024, 900 * 1024)


@pytest.mark.slow
@pytest.mark.ray
def test_two_real_replicas_are_weighed(artifact: Path) -> None:
    line = startup.replica_memory(str(artifact))
    assert len(line["uss_mib"]) == len(line["pss_mib"]) == len(line["rss_mib"]) == 2
    for uss, pss, rss in zip(line["uss_mib"], line["pss_mib"], line["rss_mib"], strict=True):
        assert uss < pss < rss
    assert min(line["uss_mib"]) > 50  # Ray's own imports alone


@pytest.mark.slow
@pytest.mark.ray
def test_the_empty_app_becomes_ready(artifact: Path) -> None:
    line = startup.ready(str(artifact), "default", "empty", run=0)
    assert line["seconds"] > 0
    assert {"ray", "serve", "app"} <= line["parts"].keys()


def test_calm_is_a_tree_that_takes_little_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tree, "CALM_S", 0.01)
    assert wait_until_calm(os.getpid(), tries=0) is False
    readings = iter([0.0, 1.0, 1.0, 1.001, 0.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(ProcessTree, "cpu_seconds", lambda _: next(readings))
    assert wait_until_calm(os.getpid(), tries=2) is True
    assert wait_until_calm(os.getpid(), tries=2) is False
