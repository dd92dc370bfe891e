"""Where Ray puts the ranks of a replica, and configurations that leave them no place."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.app import build
from deployments.args import AppArgs
from deployments.placement import Cluster, Placement, place
from torchweave_ray.errors import ConfigError

TWO = {"engine": {"tensor_parallel_size": 2}}
GPUS = ({"CPU": 1, "GPU": 1},) * 2
KIND = {"accelerator_type:H100": 0.001}
OWN: dict[str, Any] = {
    "placement_group": {"bundles": [{"CPU": 2, "GPU": 1}] * 3, "strategy": "STRICT_PACK"}
}


def args(**model: Any) -> AppArgs:
    return AppArgs.model_validate({"models": [{"id": "m", **model}]})


@pytest.mark.parametrize(
    ("model", "cluster", "wanted"),
    [
        (TWO, Cluster(8, 1, 2), Placement(1, 1, 1, GPUS, "STRICT_PACK")),
        (
            TWO | {"num_cpus": 3},
            Cluster(8, 1, 2),
            Placement(3, 1, 1, ({"CPU": 3, "GPU": 1},) * 2, "STRICT_PACK"),
        ),
        (
            TWO | {"accelerator_type": "H100"},
            Cluster(8, 1, 4),
            Placement(1, 1, 1, tuple(bundle | KIND for bundle in GPUS), "STRICT_PACK"),
        ),
        (TWO, Cluster(9, 1, 0), Placement(4, 0, 1, ({"CPU": 4},) * 2, "STRICT_PACK")),
        (TWO, Cluster(1, 1, 0), Placement(0.4, 0, 1, ({"CPU": 0.4},) * 2, "STRICT_PACK")),
        (
            TWO | OWN,
            Cluster(8, 1, 2),
            Placement(2, 1, 1, ({"CPU": 2, "GPU": 1},) * 3, "STRICT_PACK"),
        ),
    ],
)
def test_a_bundle_for_each_rank(model: dict[str, Any], cluster: Cluster, wanted: Placement) -> None:
    said = args(**model)
    assert place(said, cluster) == [wanted]


def test_the_deployment_asks_for_its_bundles() -> None:
    app = build(args(device="cuda", **TWO))
    replica = app._bound_deployment.init_args[1]["m"]._bound_deployment
    config = replica._replica_config
    assert config.placement_group_bundles == [{"CPU": 1, "GPU": 1}] * 2
    assert config.placement_group_strategy == "STRICT_PACK"
    assert config.ray_actor_options["num_gpus"] == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_gpus": 2}, "engine.tensor_parallel_size 2 gives each rank a GPU: leave num_gpus"),
        ({"lora": {"source": "x"}}, "does not go with lora"),
        ({"placement_group": {"bundles": [{"GPU": 1}]}}, "but placement_group.bundles has 1"),
        (
            {"placement_group": {"bundles": [{"GPU": 1}] * 2}},
            "placement_group.strategy must be STRICT_PACK",
        ),
        ({"engine": {"tensor_parallel_size": 0}}, "tensor_parallel_size must be at least 1"),
    ],
)
def test_what_leaves_ranks_no_place(model: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        args(**(TWO | model))
