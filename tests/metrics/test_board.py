"""Our board's queries, asked of a real Prometheus that scrapes a real server under traffic."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.serve import cluster
from tests.serve.cluster import wait_until
from tests.serve.test_launch import PROMPT, Server
from tests.tiny import make_tiny_artifact

ROOT = Path(__file__).resolve().parent.parent.parent
BOARD = ROOT / "configs/grafana/torchweave.json"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None, reason="needs prometheus and promtool on the path"
)
TRAFFIC_S = 25.0
VARIABLES = {"$__rate_interval": "20s", "$model": ".*", "$replica": ".*"}


def panels() -> Iterator[tuple[str, str]]:
    """(title, query) of every query of the board."""
    for panel in json.loads(BOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield panel["title"], query


def test_the_board_reads_what_the_page_of_metrics_lists() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    listed = {name for row in re.findall(r"^\| (`.+?) \|", page, re.M) for name in row.split(", ")}
    read = {name for _, query in panels() for name in re.findall(r"torchweave_(\w+)", query)}
    known = {name.strip("`") for name in listed}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in read} <= known


@needs_prometheus
def test_the_alert_rules_are_sound() -> None:
    config = ROOT / "configs/prometheus/prometheus.yaml"
    ran = subprocess.run(
        [str(PROMTOOL), "check", "config", str(config)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


class Prometheus:
    def __init__(self, folder: Path, *targets: str) -> None:
        self._port = cluster.free_port()
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "all", "static_configs": [{"targets": [*targets]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        command = [str(PROMETHEUS), f"--config.file={folder / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{self._port}"]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def values(self, query: str) -> list[float]:
        url = f"http://127.0.0.1:{self._port}/api/v1/query?query={urllib.parse.quote(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
        return [float(series["value"][1]) for series in result]


def _agent_port(server: Server) -> int:
    """Where Ray's agent of this node exports metrics."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        found = re.search(r"--metrics-export-port=(\d+)", " ".join(process.cmdline()))
        if found and "agent.py" in " ".join(process.cmdline()):
            return int(found[1])
    raise AssertionError("Ray runs no agent")


def _traffic(server: Server) -> None:
    body: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
    ends_at = time.monotonic() + TRAFFIC_S
    while time.monotonic() < ends_at:
        server.client.text(PROMPT * 8, **body)
        assert server.client.post("/v1/completions", promt="x")[0] == 400
        time.sleep(0.1)


@needs_prometheus
@pytest.mark.ray
@pytest.mark.slow
def test_no_panel_is_empty_in_a_real_run(tmp_path: Path) -> None:
    server = Server(tmp_path, make_tiny_artifact(tmp_path / "tiny"))
    prometheus = None
    try:
        wait_until(lambda: server.says("[Serve] try:"), 120)
        own, agent = f"127.0.0.1:{server.client.port}", f"127.0.0.1:{_agent_port(server)}"
        prometheus = Prometheus(tmp_path, own, agent)
        _traffic(server)
        found = {(title, query): prometheus.values(query) for title, query in panels()}
        empty = [key for key, values in found.items() if not any(map(math.isfinite, values))]
        assert not empty, empty
        moving = {title for (title, _), values in found.items() if any(v > 0 for v in values)}
        assert {"Tokens a second", "Time to first token", "HTTP errors, by kind"} <= moving
        by_ray = "ray_vllm_generation_tokens_total", "ray_vllm_time_to_first_token_seconds_count"
        by_ray += "ray_torchweave_http_requests_total", "ray_vllm_kv_cache_usage_perc"
        wait_until(lambda: all(prometheus.values(query) for query in by_ray), 60)
    finally:
        if prometheus is not None:
            prometheus.process.terminate()
        server.stop()
