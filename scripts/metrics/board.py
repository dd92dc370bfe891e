"""What every panel of our Grafana board, and of Ray's "Serve LLM", shows in a real run.

python scripts/metrics/board.py ARTIFACT [--seconds 60] [--save]

`torchweave serve` with two replicas, a Prometheus that scrapes it and Ray's agent, and clients that
give each panel something to show: shared prompts, bursts that are refused, a killed replica.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from rich.console import Console
from rich.table import Table

from torchweave_ray.bench.origin import save_results
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.server_process import (
    RunningServer,
    application_file,
    free_port,
    started_server,
)

BOARD = Path(__file__).resolve().parents[2] / "configs/grafana/torchweave.json"
INTERVAL = "10s"
OURS = {"$__rate_interval": INTERVAL, "$model": ".*", "$replica": ".*"}
RAYS = {"$interval": INTERVAL, "$vllm_model_name": ".*", "$workerid": ".*"}
RAYS |= {"$deployment": ".*", "$Cluster": ".*"}
REPLICA = "ray::ServeReplica:torchweave:ModelReplica"
NUM_CLIENTS, BURST = 6, 24
EXPORTED_EVERY_S = 10.0
"""By Ray's workers to their agent."""
_KV_TOKENS = 900
_SENTENCE = "The quick brown fox jumps over the lazy dog and runs along the river. "


@dataclass(frozen=True, slots=True)
class Shown:
    """What a panel showed: by series (its labels) the least and the most, over the run."""

    panel: str
    series: Mapping[str, tuple[float, float]]

    @property
    def moved(self) -> bool:
        return any(most > 0 for _, most in self.series.values())


def queries(board: Mapping[str, Any], values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(panel, query) of a board, rows within rows included, its variables filled in."""
    for panel in board["panels"]:
        yield from queries({"panels": panel.get("panels", [])}, values)
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in values.items():
                query = query.replace(name, value)
            yield panel["title"], query


def our_queries() -> list[tuple[str, str]]:
    return list(queries(json.loads(BOARD.read_text()), OURS))


def ray_queries() -> list[tuple[str, str]]:
    """Of the board "Serve LLM" that the installed Ray makes."""
    from ray.dashboard.modules.metrics.grafana_dashboard_factory import (
        generate_serve_llm_grafana_dashboard,
    )

    content = generate_serve_llm_grafana_dashboard()
    board = json.loads(content[0] if isinstance(content, tuple) else content)
    return list(queries(board, RAYS))


class Prometheus:
    def __init__(self, folder: Path, targets: list[str]) -> None:
        self._url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "all", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address={self._url.removeprefix('http://')}"]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self._began_at = time.time()

    def shown(self, query: str) -> dict[str, tuple[float, float]]:
        """Since it started, (least, most) by the series' labels; what is no number is left out."""
        asked = {"query": query, "start": self._began_at, "end": time.time(), "step": 1}
        url = f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
        found = {}
        for series in result:
            labels = ", ".join(f"{k}={v}" for k, v in sorted(series["metric"].items()))
            values = [float(value) for _, value in series["values"]]
            if values := [value for value in values if math.isfinite(value)]:
                found[labels] = (min(values), max(values))
        return found


@contextmanager
def prometheus(server: RunningServer) -> Iterator[Prometheus]:
    folder = Path(tempfile.mkdtemp(prefix="torchweave-board-"))
    try:
        found = Prometheus(folder, [server.url.removeprefix("http://"), agent_address(server.pid)])
        try:
            yield found
        finally:
            found.process.terminate()
            found.process.wait(20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def agent_address(pid: int) -> str:
    """Where Ray's agent of the only node exports metrics: it takes a free port, and notes it in
    the session's folder. Its argument of that name says 0."""
    for process in ProcessTree([pid]).named("--session-dir="):
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        folder = next(a.partition("=")[2] for a in command if a.startswith("--session-dir="))
        for note in Path(folder).glob("metrics_export_port_*"):
            return f"127.0.0.1:{note.read_text().strip()}"
    raise RuntimeError(f"no Ray below process {pid} exports metrics")


def serve_config(artifact: Path, folder: Path, kv_bytes_per_token: int) -> Path:
    """Two small replicas: KV memory and backlog are short, so that there is something to see."""
    engine = {
        "max_model_len": 512,
        "cache": {"kv_memory": _KV_TOKENS * kv_bytes_per_token},
        "scheduler": {"max_num_seqs": 8, "max_waiting_tokens": 1500},
        "speculation": {"method": "ngram"},
    }
    model = {"id": "model", "artifact": str(artifact.absolute()), "num_replicas": 2}
    model |= {"threads": 1, "num_cpus": 0.5, "engine": engine}
    return application_file(folder, {"models": [model]})


class Traffic:
    """Clients that ask again and again until the time is over; what they are told is counted."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self.statuses: dict[int, int] = {}
        self._lock = threading.Lock()

    def run(self, seconds: float, server_pid: int) -> None:
        """Half way through, a replica is killed under its streams."""
        with ThreadPoolExecutor(NUM_CLIENTS + BURST) as pool:
            asked = [pool.submit(self._client, number) for number in range(NUM_CLIENTS)]
            time.sleep(seconds / 4)
            asked += [pool.submit(self._ask, 200, 16, f"burst {i} ") for i in range(BURST)]
            time.sleep(seconds / 4)
            os.kill(busiest(ProcessTree([server_pid]).named(REPLICA)), signal.SIGKILL)
            time.sleep(seconds / 2)
            self._over.set()
            for each in asked:
                each.result()

    def _client(self, number: int) -> None:
        turn = 0
        while not self._over.is_set():
            self._ask(100 + 30 * (turn % 3), 120, "" if turn % 2 else f"{number} {turn} ")
            if number == 0:
                self._post("/v1/completions", {"promt": "a field with a typing error"})
            turn += 1

    def _ask(self, num_words: int, num_tokens: int, begin: str) -> None:
        """A stream of a prompt that others share, unless it begins in its own way."""
        words = (_SENTENCE * 40).split()[:num_words]
        body = {"prompt": begin + " ".join(words), "max_tokens": num_tokens, "stream": True}
        self._post("/v1/completions", body | {"ignore_eos": True, "temperature": 0})

    def _post(self, path: str, body: dict[str, Any]) -> None:
        try:
            status = requests.post(self._url + path, json=body, timeout=120).status_code
        except requests.RequestException:
            status = 0
        with self._lock:
            self.statuses[status] = self.statuses.get(status, 0) + 1


def busiest(pids: list[int]) -> int:
    """The one that computes most right now: it has streams to lose."""
    before = {pid: ProcessTree([pid]).cpu_seconds() for pid in pids}
    time.sleep(0.5)
    return max(pids, key=lambda pid: ProcessTree([pid]).cpu_seconds() - before[pid])


def watch(artifact: Path, seconds: float, kv_bytes_per_token: int) -> dict[str, Any]:
    """By board what each panel showed, and how the requests ended (0: no answer)."""
    folder = Path(tempfile.mkdtemp(prefix="torchweave-board-"))
    try:
        config = serve_config(artifact, folder, kv_bytes_per_token)
        with started_server((str(config), "--no-dashboard")) as server:
            traffic = Traffic(server.url)
            with prometheus(server) as asked:
                traffic.run(seconds, server.pid)
                time.sleep(EXPORTED_EVERY_S + 2)
                boards = {
                    "TorchWeave Ray": _shown(asked, our_queries()),
                    "Serve LLM": _shown(asked, ray_queries()),
                }
        return {"boards": boards, "statuses": dict(sorted(traffic.statuses.items()))}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(asked: Prometheus, of: list[tuple[str, str]]) -> list[Shown]:
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for panel, query in of:
        series = panels.setdefault(panel, {})
        for labels, extent in asked.shown(query).items():
            series[f"{_brief(query)} {labels}".strip()] = extent
    return [Shown(panel, series) for panel, series in panels.items()]


def _brief(query: str) -> str:
    """Which of a panel's lines: its quantile, and the metric that it reads."""
    quantile = re.search(r"histogram_quantile\(([\d.]+)", query)
    metric = re.search(r"\b(?:ray_)?(?:torchweave|vllm|serve)_\w+", query)
    words = [f"p{100 * float(quantile[1]):.0f}"] if quantile else []
    return " ".join([*words, metric[0] if metric else ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kv-bytes-per-token", type=int, default=23_040, help="SmolLM2-135M's")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found = watch(given.artifact, given.seconds, given.kv_bytes_per_token)
    points = []
    for board, panels in found["boards"].items():
        table = Table("panel", "series", "least", "most", title=board)
        for shown in panels:
            points.append({"board": board, "panel": shown.panel, "series": dict(shown.series)})
            for labels, (least, most) in shown.series.items() or {"-": (math.nan,) * 2}.items():
                table.add_row(shown.panel, labels, f"{least:.4g}", f"{most:.4g}")
        Console(width=200).print(table)
    print("answers by status:", found["statuses"])
    if given.save:
        config = {"seconds": given.seconds, "statuses": found["statuses"]}
        print(save_results("board", config, points))


if __name__ == "__main__":
    main()
