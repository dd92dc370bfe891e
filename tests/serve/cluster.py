"""A Ray cluster for tests: small, on free ports, and what the tests ask it. No test in here."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.server_process import free_port as free_port

CONFIG = Path(__file__).resolve().parents[2] / "serve_config.yaml"


STORE_BYTES = 80 << 20


@contextmanager
def ray_cluster(num_cpus: int, port: int) -> Iterator[None]:
    options = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    with serving_on("local", port, num_cpus=num_cpus, **options):
        yield


@contextmanager
def serving_on(address: str, port: int, **options: Any) -> Iterator[None]:
    """`options`: of ray.init."""
    ray.init(address=address, namespace="serve", log_to_driver=False, **options)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def config(args: dict[str, Any], **application: Any) -> ServeDeploySchema:
    """serve_config.yaml with other arguments: what runs is what the file says."""
    values = yaml.safe_load(CONFIG.read_text())
    values["applications"][0] |= {"args": args, **application}
    return ServeDeploySchema.model_validate(values)


def tiny_model(artifact: Path, /, **more: Any) -> dict[str, Any]:
    """Arguments of one whose replicas take a core each. `kv_memory`, `scheduler`: of its engine."""
    engine = {"cache": {"kv_memory": more.pop("kv_memory", 4 << 20)}}
    if scheduler := more.pop("scheduler", None):
        engine["scheduler"] = scheduler
    model = {"id": "tiny", "artifact": str(artifact), "num_cpus": 1, "threads": 1}
    return {**model, "engine": engine, **more}


def deploy(*configs: ServeDeploySchema) -> None:
    first = configs[0].model_copy(deep=True)
    first.applications = [app for each in configs for app in each.applications]
    _get_global_client().deploy_apps(first, _blocking=False)


def wait_until(done: Callable[[], Any], timeout_s: float = 180) -> Any:
    """The first truthy answer; patient, for a machine may be busy with other things."""
    deadline = time.monotonic() + timeout_s
    while not (answer := done()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
    return answer


def is_running(app: str) -> bool:
    application = serve.status().applications.get(app)
    return application is not None and application.status == "RUNNING"


def deployment_message(app: str, deployment: str) -> str:
    application = serve.status().applications.get(app)
    found = application.deployments.get(deployment) if application else None
    return found.message if found else ""


def logged(app: str, deployment: str, text: str) -> list[dict[str, Any]]:
    """Lines with `text` in the log files of a deployment's replicas, as the dashboard has them."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    files = logs.glob(f"replica_{app}_{deployment.replace(':', '_')}_*.log")
    lines = [line for log in files for line in log.read_text().splitlines() if text in line]
    return [json.loads(line) for line in lines]


def replica_pids(deployment: str, app: str = "torchweave") -> list[int]:
    """Processes of a deployment."""
    return pids_of(f"ray::ServeReplica:{app}:{deployment}")


def pids_of(title: str) -> list[int]:
    """Processes of the cluster that this process started only."""
    return ProcessTree([os.getpid()]).named(title)


class Client:
    """HTTP over one connection a call, with the stream's events as they come."""

    def __init__(self, port: int, prefix: str = "") -> None:
        self.port = port
        self.prefix = prefix

    def get(self, path: str) -> tuple[int, Any]:
        return self._call("GET", path, None)[:2]

    def post(self, path: str, **body: Any) -> tuple[int, Any, dict[str, str]]:
        return self._call("POST", path, body)

    def _call(self, method: str, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method, self.prefix + path, None if body is None else json.dumps(body)
            )
            response = connection.getresponse()
            text = response.read().decode()
            try:
                answer = json.loads(text)
            except ValueError:
                answer = text
            return response.status, answer, {k.lower(): v for k, v in response.getheaders()}
        finally:
            connection.close()

    def stream(self, prompt: str, **body: Any) -> Stream:
        return Stream(self, {"prompt": prompt, "temperature": 0, **body})

    def text(self, prompt: str, **body: Any) -> str:
        stream = self.stream(prompt, **body)
        return "".join(stream.pieces())


class Stream:
    """One /v1/completions stream; leaving it early hangs up."""

    def __init__(self, client: Client, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        body = {"stream": True, "stream_options": {"include_usage": True}, **body}
        self._connection.request("POST", client.prefix + "/v1/completions", json.dumps(body))
        self.response = self._connection.getresponse()
        assert self.response.status == 200, self.response.read()
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None

    def pieces(self) -> Iterator[str]:
        for _, text in self.indexed_pieces():
            yield text

    def indexed_pieces(self) -> Iterator[tuple[int, str]]:
        """(choice's index, text)."""
        for raw in self.response:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                yield choice["index"], choice["text"]
        self.hang_up()

    def hang_up(self) -> None:
        self.response.close()
        self._connection.close()
