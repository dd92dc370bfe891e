"""How many CPUs and GPUs a replica asks Ray for. Pure arithmetic but for `probe_cluster`.

Asks for no more than exists, and leaves the ingresses their share, so that the application can
always be scheduled. Ray's CPUs are bookkeeping: a replica computes with all its node's cores,
divided by the replicas there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import ray

from deployments.args import AppArgs, ModelArgs, StagingArgs
from torchweave_ray.config import EngineConfig, LoraConfig
from torchweave_ray.kernels.machine import num_cores


@dataclass(frozen=True, slots=True)
class Cluster:
    node_cpus: float
    """Of the smallest node that has any."""
    num_nodes: int
    num_gpus: float


@dataclass(frozen=True, slots=True)
class Placement:
    num_cpus: float
    num_gpus: float
    replicas_per_device: int
    """That share one GPU, or a node's cores and memory."""
    bundles: tuple[Mapping[str, float], ...] = ()
    """Of a placement group; the replica has the first one, its other ranks the next ones."""
    strategy: str = "PACK"
    """Of that group."""


def probe_cluster() -> Cluster:
    """The running cluster, or this machine when Ray has not started yet."""
    if ray.is_initialized():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = [resources["CPU"] for resources in nodes if resources.get("CPU", 0) > 0]
        gpus = sum(resources.get("GPU", 0) for resources in nodes)
        return Cluster(min(cpus, default=1), max(1, len(cpus)), gpus)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return Cluster(num_cores(), 1, gpus)


def place(args: AppArgs, cluster: Cluster) -> list[Placement]:
    """One placement a model."""
    gpu_models = [model for model in args.models if _wants_gpu(model, cluster)]
    cpu_models = [model for model in args.models if model not in gpu_models]
    num_on_gpu = sum(model.most_replicas * model.num_ranks for model in gpu_models)
    num_on_cpu = sum(model.most_replicas for model in cpu_models)
    gpu_share = _gpu_share(num_on_gpu, cluster)
    per_node = max(1, math.ceil(num_on_cpu / cluster.num_nodes))
    free = cluster.node_cpus - args.ingress.num_cpus * args.ingress.num_replicas - num_on_gpu
    cpu_share = _cpu_share(free, per_node)
    placements = []
    for model in args.models:
        if model.placement_group is not None:
            placements.append(_in_group(model, model in gpu_models, per_node))
        elif model.num_ranks > 1:
            cpus = _cpu_share(model.num_cpus or cpu_share, model.num_ranks)
            placements.append(_ranks(model, model in gpu_models, cpus, per_node))
        elif model in gpu_models:
            share = model.num_gpus or gpu_share
            placements.append(Placement(model.num_cpus or 1, share, _sharing(share)))
        else:
            placements.append(Placement(model.num_cpus or cpu_share, 0, per_node))
    return placements


def _in_group(model: ModelArgs, on_gpu: bool, per_node: int) -> Placement:
    """The replica takes what its bundle has; Ray looks for an accelerator's kind there too."""
    assert model.placement_group is not None
    first, *others = _of_kind(model, model.placement_group.bundles)
    gpus = (model.num_gpus or first["GPU"]) if on_gpu else 0
    cpus = model.num_cpus or first.get("CPU", 0)
    sharing = _sharing(gpus) if on_gpu else per_node
    strategy = model.placement_group.strategy
    return Placement(cpus, gpus, sharing, (first, *others), strategy)


def _ranks(model: ModelArgs, on_gpu: bool, cpu_share: float, per_node: int) -> Placement:
    """A bundle for each, on one node: a GPU of its own, or its part of the CPUs."""
    num = model.num_ranks
    if not on_gpu:
        return Placement(cpu_share, 0, per_node, ({"CPU": cpu_share},) * num, "STRICT_PACK")
    cpus = model.num_cpus or 1
    bundles = _of_kind(model, ({"CPU": cpus, "GPU": 1},) * num)
    return Placement(cpus, 1, 1, bundles, "STRICT_PACK")


def _of_kind(
    model: ModelArgs, bundles: tuple[dict[str, float], ...]
) -> tuple[dict[str, float], ...]:
    """Those of the ranks ask for the accelerator's kind."""
    if model.accelerator_type is None:
        return bundles
    kind = {f"accelerator_type:{model.accelerator_type}": 0.001}
    num = model.num_ranks
    return (*(bundle | kind for bundle in bundles[:num]), *bundles[num:])


def _sharing(num_gpus: float) -> int:
    return max(1, math.floor(1 / num_gpus)) if num_gpus < 1 else 1


def _wants_gpu(model: ModelArgs, cluster: Cluster) -> bool:
    """`cuda` asks for a GPU even where there is none yet: an autoscaler may bring it. So do a kind
    of accelerator and a bundle with a GPU."""
    if model.device == "cpu":
        return False
    if model.placement_group is not None:
        return "GPU" in model.placement_group.bundles[0]
    asks = model.device == "cuda" or model.accelerator_type is not None
    return asks or cluster.num_gpus > 0


def _gpu_share(num_replicas: int, cluster: Cluster) -> float:
    if not cluster.num_gpus or num_replicas <= cluster.num_gpus:
        return 1
    return 1 / math.ceil(num_replicas / cluster.num_gpus)


def _cpu_share(free: float, replicas: int) -> float:
    """Whole CPUs where there is one for each replica, else tenths."""
    share = free / replicas
    return math.floor(share) if share >= 1 else max(0.1, math.floor(share * 10) / 10)


def threads_of(model: ModelArgs, placement: Placement, cores: int) -> int:
    """CPU threads of a replica on a node where this process may use so many cores."""
    return model.threads or max(1, cores // placement.replicas_per_device)


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    model: ModelArgs
    placement: Placement
    artifact_dir: str | None
    artifact_cache: str | None = None
    staging: StagingArgs = field(default_factory=StagingArgs)
    verify: Literal["auto", "full"] = "auto"

    def engine_config(self, cores: int) -> EngineConfig:
        """What the operator wrote, with what follows from where this replica was placed."""
        config = EngineConfig.from_dict(self.model.engine)
        runner = replace(
            config.runner,
            device="cuda" if self.placement.num_gpus else "cpu",
            threads=threads_of(self.model, self.placement, cores),
        )
        cache = config.cache
        if "replicas_per_node" not in self.model.engine.get("cache", {}):
            cache = replace(cache, replicas_per_node=self.placement.replicas_per_device)
        lora = self.model.lora
        adapters = config.lora if lora is None else LoraConfig(**lora.model_dump())
        return replace(config, runner=runner, cache=cache, lora=adapters)
