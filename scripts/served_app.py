"""The application with several replicas and ingresses on a Ray of this process, in the profile of
`torchweave serve`. For the scripts that measure what happens when parts of it go."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.server_process import free_port
from torchweave_ray.cli.serve import haproxy_profile

REPLICA, INGRESS = "ServeReplica:torchweave:ModelReplica", "ServeReplica:torchweave:Ingress"
NUM_REPLICAS, NUM_INGRESSES = 3, 2
SETTLE_S = 2.0
TIMEOUT_S = 120.0


class Application:
    """On a Ray of this process."""

    def __init__(self, recipe: str, port: int) -> None:
        self._recipe = recipe
        self._port = port
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, max_num_seqs: int = 32, user_config: dict[str, int] | None = None) -> None:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        model = {"id": "m", "recipe": self._recipe, "num_replicas": NUM_REPLICAS, "num_cpus": 0.2}
        scheduler = {"max_num_seqs": max_num_seqs}
        engine = {"cache": {"kv_memory": 64 << 20}, "scheduler": scheduler}
        args = {
            "models": [{**model, "threads": 1, "engine": engine}],
            "ingress": {"num_replicas": NUM_INGRESSES, "num_cpus": 0.1},
        }
        rolling = {"name": "ModelReplica:m", "max_surge_percent": 100}
        application: dict[str, object] = {
            "name": "torchweave",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": args,
            "deployments": [rolling | ({"user_config": user_config} if user_config else {})],
        }
        values: dict[str, object] = {"proxy_location": "HeadOnly", "applications": [application]}
        values["http_options"] = {"host": "127.0.0.1", "port": self._port}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(values), _blocking=False)

    def is_whole(self) -> bool:
        from ray import serve

        application = serve.status().applications.get("torchweave")
        return (
            application is not None
            and application.status == "RUNNING"
            and len(self.pids(REPLICA)) == NUM_REPLICAS
            and len(self.pids(INGRESS)) == NUM_INGRESSES
        )

    def pids(self, title: str) -> list[int]:
        return ProcessTree([os.getpid()]).named("ray::" + title)

    def is_replaced(self, old: set[int]) -> bool:
        return not old & {*self.pids(REPLICA), *self.pids(INGRESS)} and self.is_whole()

    def settle(self) -> None:
        """All there, and known to HAProxy and the routers."""
        wait_until(self.is_whole)
        time.sleep(SETTLE_S)

    def hit_by_a_lost_replica(self) -> set[str]:
        """Call ids of the streams that went on elsewhere, from the ingresses' logs."""
        import ray

        logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
        text = "".join(log.read_text() for log in logs.glob("*torchweave_Ingress*.log"))
        return set(re.findall(r"\[Request\] (\S+) goes on elsewhere", text))


@contextmanager
def application(recipe: str) -> Iterator[Application]:
    folder = Path(tempfile.mkdtemp(prefix="torchweave-"))
    # Before Ray Serve is imported, which reads it.
    os.environ.update({"RAY_worker_niceness": "0"} | haproxy_profile(folder))
    import ray
    from ray import serve

    from deployments.drain.drain import end_haproxy

    app = Application(recipe, free_port())
    ray.init(
        address="local",
        namespace="serve",
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=False,
    )
    try:
        http_options = {"host": "127.0.0.1", "port": int(app.url.rpartition(":")[2])}
        serve.start(proxy_location="HeadOnly", http_options=http_options)
        app.deploy()
        app.settle()
        yield app
    finally:
        serve.shutdown()
        ray.shutdown()
        end_haproxy()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {TIMEOUT_S} s: {done}")
        time.sleep(0.05)
