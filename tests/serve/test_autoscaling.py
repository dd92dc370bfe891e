"""Autoscaling: the policy's arithmetic, what the application asks of Serve, and Serve doing it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.config import AutoscalingConfig

from deployments.app import build
from deployments.args import AppArgs
from deployments.autoscaling import SlotsKvBacklog, recorded
from deployments.placement import Cluster, place
from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.errors import ConfigError

TINY = "ModelReplica:tiny"
POLICY = SlotsKvBacklog(target_load=0.5, max_backlog_tokens=1000, slots=8)


def wanted(num_requests: float, *replicas: dict[str, float]) -> int:
    by_name = {
        name: {f"r{i}": replica[name] for i, replica in enumerate(replicas)}
        for name in recorded(0, 0, 0, 0)
    }
    ctx = SimpleNamespace(
        aggregated_metrics=by_name if replicas else None, total_num_requests=num_requests
    )
    desired, state = POLICY(ctx)
    assert state == {}
    return desired


@pytest.mark.parametrize(
    ("num_requests", "replicas", "number"),
    [
        (0, [], 0),
        (1, [], 1),
        (5, [], 2),
        (0, [recorded(0, 8, 0, 0)], 0),
        (4, [recorded(4, 8, 0.1, 0)], 1),
        (4, [recorded(5, 8, 0.1, 0)], 2),  # n = 2 takes two slots
        (5, [recorded(4, 8, 0.1, 0)], 2),  # one is not with a replica yet
        (5, [recorded(5, 16, 0.1, 0)], 1),  # what a replica says goes over the configuration
        (1, [recorded(1, 8, 0.5, 0)], 1),
        (1, [recorded(1, 8, 0.51, 0)], 2),
        (2, [recorded(1, 8, 0.5, 0), recorded(1, 8, 0.6, 0)], 3),
        (1, [recorded(1, 8, 0.1, 1000)], 1),
        (1, [recorded(1, 8, 0.1, 3500)], 4),
        (2, [recorded(1, 8, 0.1, 3500), recorded(1, 8, 0.1, 0)], 4),
        (0.0004, [recorded(0, 8, 0, 0)], 0),  # a health check's share of the average
    ],
)
def test_the_policy(num_requests: float, replicas: list[dict[str, float]], number: int) -> None:
    assert wanted(num_requests, *replicas) == number


def test_more_load_never_asks_for_less() -> None:
    for load in range(100):
        less = wanted(load, recorded(load, 8, load / 100, load * 50))
        assert wanted(load + 1, recorded(load + 1, 8, (load + 1) / 100, load * 50 + 50)) >= less


def test_the_policy_travels_without_us() -> None:
    """Serve's controller may not have our package: the policy is pickled by value."""
    policy = AutoscalingConfig(policy={"policy_function": "deployments.autoscaling:SlotsKvBacklog"})
    raw = policy.policy.get_serialized_policy_def()
    code = (
        "import pickle, sys\nsys.modules['deployments'] = None\n"
        "policy = pickle.load(sys.stdin.buffer)(0.5, 1000, 8)\n"
        "assert policy.wanted({}, 5) == 2\n"
    )
    assert raw is not None
    assert pickle.loads(raw).__name__ == "SlotsKvBacklog"
    subprocess.run([sys.executable, "-c", code], input=raw, check=True, capture_output=True)


def args(**model: Any) -> AppArgs:
    return AppArgs.model_validate({"models": [{"id": "tiny", "artifact": "/a", **model}]})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"autoscaling": {"max_replica": 2}}, "did you mean 'max_replicas'"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas = 2 is below"),
        ({"autoscaling": {"max_replicas": 2}, "num_replicas": 2}, "not both"),
    ],
)
def test_what_is_wrong_is_named(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        args(**model)


def deployment(app_args: AppArgs) -> Any:
    """Of the first model."""
    ingress_config, models, *_ = build(app_args)._bound_deployment.init_args
    return ingress_config, models[app_args.models[0].name]._bound_deployment


def test_it_is_off_until_it_is_asked_for() -> None:
    ingress_config, plain = deployment(args(num_replicas=2))
    assert plain._deployment_config.autoscaling_config is None
    assert plain.num_replicas == 2
    assert ingress_config.sleepers == ()
    engine = {"scheduler": {"max_num_seqs": 4}}
    asked = args(autoscaling={"min_replicas": 0, "max_replicas": 3}, engine=engine)
    ingress_config, scaled = deployment(asked)
    found = scaled._deployment_config.autoscaling_config
    assert (found.min_replicas, found.initial_replicas, found.max_replicas) == (0, 1, 3)
    assert found.look_back_period_s == 5 * found.metrics_interval_s == 10
    assert found.policy.policy_kwargs == {
        "target_load": 0.7,
        "max_backlog_tokens": 8192,
        "slots": 4,
    }
    assert ingress_config.sleepers == ("tiny",)


def test_all_the_replicas_that_may_come_have_their_share() -> None:
    (placement,) = place(args(autoscaling={"max_replicas": 3}), Cluster(8, 1, 0))
    assert (placement.num_cpus, placement.replicas_per_device) == (2, 3)


@pytest.mark.ray
@pytest.mark.slow
def test_serve_scales_with_the_load_and_to_nothing(tmp_path: Path) -> None:
    """1 -> 2 under load, to 0 when idle, and up again for a request, which waits for it."""
    artifact = make_tiny_artifact(tmp_path / "tiny", max_position_embeddings=1024)
    port = cluster.free_port()
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "interval_s": 0.3,
    }
    engine = {"scheduler": {"max_num_seqs": 2}, "cache": {"kv_memory": 4 << 20}}
    model = {"id": "tiny", "artifact": str(artifact), "num_cpus": 0.5, "threads": 1}
    client = Client(port)
    body = {"model": "tiny", "prompt": "the quick brown fox", "ignore_eos": True, "seed": 1}
    with cluster.ray_cluster(num_cpus=4, port=port), ThreadPoolExecutor(8) as pool:
        deploy(config({"models": [model | {"autoscaling": scaling, "engine": engine}]}))
        wait_until(lambda: client.get("/health")[0] == 200)
        _, before, _ = client.post("/v1/completions", **body, max_tokens=20)
        has_scaled = False

        def load() -> None:
            while not has_scaled:
                status, answer, _ = client.post("/v1/completions", **body, max_tokens=300)
                assert status == 200, answer

        loads = [pool.submit(load) for _ in range(6)]
        try:
            wait_until(lambda: num_running() == 2, 60)
        finally:
            has_scaled = True
        for each in loads:
            each.result(60)
        wait_until(lambda: num_running() == 0 and not cluster.replica_pids(TINY), 60)
        assert client.get("/health") == (200, {"status": "ok"})
        assert client.get("/v1/models")[1]["data"][0]["id"] == "tiny"
        assert num_running() == 0, "asking for health woke it"
        status, after, _ = client.post("/v1/completions", **body, max_tokens=20)
        assert status == 200
        assert after["choices"] == before["choices"]


def num_running() -> int:
    application = serve.status().applications.get("torchweave")
    found = application.deployments.get(TINY) if application else None
    return found.replica_states.get("RUNNING", 0) if found else -1
