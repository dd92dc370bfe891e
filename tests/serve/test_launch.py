"""`torchweave serve` as a process: the HAProxy profile, the ready line, the drain on SIGTERM."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.serve import cluster
from tests.serve.cluster import CONFIG, Client, wait_until
from tests.serve.lifecycle.closed_loop import ClosedLoop
from tests.tiny import make_tiny_artifact
from torchweave_ray.cli.serve import haproxy_profile
from torchweave_ray.models.artifact import WEIGHTS

PROMPT = "the quick brown fox"


class Server:
    def __init__(self, folder: Path, artifact: Path, *options: str) -> None:
        values = yaml.safe_load(CONFIG.read_text())
        model = {"id": "tiny", "artifact": str(artifact), "threads": 1}
        values["applications"][0]["args"]["models"] = [
            model | {"engine": {"cache": {"kv_memory": 4 << 20}}}
        ]
        config = folder / "serve.yaml"
        config.write_text(yaml.safe_dump(values))
        self.client = Client(cluster.free_port())
        self.log = folder / "log"
        command = [sys.executable, "-m", "torchweave_ray.cli", "serve", str(config)]
        command += ["--host", "127.0.0.1", "--port", str(self.client.port), "--no-dashboard"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log)

    def says(self, text: str) -> bool:
        return text in self.log.read_text() or self.process.poll() is not None

    def stop(self) -> None:
        """Twice, which ends it at once and takes Ray with it."""
        while self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                continue


def _policies(pid: int) -> set[int]:
    return {os.sched_getscheduler(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("artifact") / "tiny")


@pytest.mark.ray
def test_haproxy_profile_and_drain(tmp_path: Path, artifact: Path) -> None:
    server = Server(tmp_path, artifact)
    try:
        wait_until(lambda: server.says("[Serve] try:"), 90)
        log = server.log.read_text()
        assert f"[Serve] ready: http://127.0.0.1:{server.client.port} (start-up " in log, log
        assert "ModelReplica:tiny: seconds: stage " in log
        assert "[Config] MAX_BATCH: the default" in log
        (ingress,) = cluster.replica_pids("Ingress")
        environment = Path(f"/proc/{ingress}/environ").read_bytes()
        assert b"RAY_SERVE_ENABLE_HA_PROXY=1" in environment
        assert b"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60" in environment
        (replica,) = cluster.replica_pids("ModelReplica")
        assert _policies(ingress) == {os.SCHED_BATCH}, "it must not interrupt a product"
        assert os.SCHED_OTHER in _policies(replica), "the model's threads wait for nobody"
        expected = server.client.text(PROMPT, max_tokens=400, ignore_eos=True)
        stream = server.client.stream(PROMPT, max_tokens=400, ignore_eos=True)
        pieces = stream.pieces()
        text = next(pieces)
        server.process.terminate()
        wait_until(lambda: server.says("[Serve] draining"), 10)
        assert text + "".join(pieces) == expected
        assert stream.finish_reason == "length"
        assert server.process.wait(60) == 0
        assert "[Serve] stopped" in server.log.read_text()
        assert "[Drain] HAProxy" not in server.log.read_text(), "it was told to close"
        for pid in (ingress, replica):
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20)
        with pytest.raises(ConnectionRefusedError):
            server.client.get("/health")
    finally:
        server.stop()


@pytest.mark.ray
@pytest.mark.slow
def test_closed_loop_clients_at_sigterm(tmp_path: Path, artifact: Path) -> None:
    """Each answer is complete or says clearly that there is none, and nothing waits for a replica
    that never comes."""
    server = Server(tmp_path, artifact)
    body = {"max_tokens": 400, "ignore_eos": True}
    try:
        wait_until(lambda: server.says("[Serve] try:"), 90)
        expected = {text: server.client.text(text, **body) for text in (PROMPT, "the lazy dog")}
        with ClosedLoop(server.client.port, expected, 16, body) as clients:
            wait_until(lambda: clients.outcomes["complete"] > 16)
            server.process.terminate()
            wait_until(lambda: clients.outcomes["503"] > 0 or clients.outcomes["refused"] > 0)
            with suppress(ConnectionError):  # it may be over already
                assert server.client.get("/readyz")[0] == 503
            assert server.process.wait(45) == 0
        assert not clients.faults, clients.outcomes
        assert clients.outcomes["503"] > 0, clients.outcomes
    finally:
        server.stop()


@pytest.mark.ray
@pytest.mark.slow
def test_two_servers_on_one_host(tmp_path: Path, artifact: Path) -> None:
    """Each with its own Ray and HAProxy; one stops, and the other one does not notice."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = (Server(folder, artifact) for folder in folders)
    try:
        for server in (first, second):
            wait_until(lambda server=server: server.says("[Serve] try:"), 120)
        expected = first.client.text(PROMPT, max_tokens=400, ignore_eos=True)
        stream = second.client.stream(PROMPT, max_tokens=400, ignore_eos=True)
        pieces = stream.pieces()
        text = next(pieces)
        first.process.terminate()
        assert first.process.wait(60) == 0
        assert text + "".join(pieces) == expected
        assert second.client.text(PROMPT, max_tokens=400, ignore_eos=True) == expected
    finally:
        first.stop()
        second.stop()


@pytest.mark.ray
def test_a_model_that_cannot_be_served_ends_it_with_the_reason(
    tmp_path: Path, artifact: Path
) -> None:
    (artifact / WEIGHTS).write_bytes(b"\0" * (artifact / WEIGHTS).stat().st_size)
    server = Server(tmp_path, artifact, "--no-haproxy")
    try:
        assert server.process.wait(90) == 1
        assert f"{WEIGHTS} was altered" in server.log.read_text().splitlines()[-1]
    finally:
        server.stop()


def test_bad_arguments_are_told_before_ray_starts(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG.read_text().replace("recipe:", "recipee:"))
    command = [sys.executable, "-m", "torchweave_ray.cli", "serve", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown key 'recipee'")


def test_a_bad_user_config_is_told_before_ray_starts(tmp_path: Path) -> None:
    limits = CONFIG.with_name("configs") / "serve" / "limits.yaml"
    config = tmp_path / "serve.yaml"
    config.write_text(limits.read_text().replace("max_num_seqs:", "max_num_seq:"))
    command = [sys.executable, "-m", "torchweave_ray.cli", "serve", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: user_config: unknown limit max_num_seq; did you mean"), last
    assert "Ray" not in done.stdout


def test_a_mistyped_recipe_is_told_before_ray_starts() -> None:
    command = [sys.executable, "-m", "torchweave_ray.cli", "serve", "--recipe", "smollm2-135m-int9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: source 'smollm2-135m-int9'")
    assert last.endswith("did you mean 'smollm2-135m-int8'?")
    assert "Ray" not in done.stdout


def test_two_runs_on_one_host_share_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the first has not taken its ports yet when the second looks for some."""
    draws = iter([20_000, 20_000, *range(20_100, 32_000, 100)])
    monkeypatch.setattr("random.randrange", lambda *_: next(draws))
    first, second = haproxy_profile(tmp_path / "a"), haproxy_profile(tmp_path / "b")
    assert "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT" in first  # Serve's default would be one for all
    for name, value in first.items():
        if "PORT" in name and "DIRECT" not in name:
            assert value != second[name]
        if "LOC" in name or "PATH" in name or "STATE" in name:
            assert value.startswith(str(tmp_path / "a"))
