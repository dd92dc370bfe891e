"""A replica's ranks as actors in the bundles of its placement group: rank i in bundle i.

The replica is rank 0, in bundle 0, and owns the others: they end when it does. What a rank does is
torchweave_ray/parallel's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.cpu_policy import compute_at_once
from deployments.placement import Placement
from torchweave_ray.errors import ConfigError
from torchweave_ray.parallel.launch import Summons


class Rank:
    """The actor."""

    def pid(self) -> int:
        return os.getpid()

    def serve(self, summons: Summons) -> None:
        """Until rank 0 is gone."""
        compute_at_once()
        from torchweave_ray.parallel.rank import serve

        serve(summons)


class RankActor:
    """A `RankProcess`."""

    def __init__(self, actor: Any, summons: Summons) -> None:
        self._actor = actor
        self._pid = actor.pid.remote()
        self._served = actor.serve.remote(summons)

    def why_ended(self) -> str | None:
        done, _ = ray.wait([self._served], timeout=0)
        if not done:
            return None
        try:
            ray.get(self._served)
        except ray.exceptions.RayActorError:
            return "its actor's process is gone"
        except ray.exceptions.RayError as error:
            return str(error).strip().splitlines()[-1]
        return "it has ended"

    def kill(self) -> None:
        """Ray asks the process to end, which one that is stopped does not hear."""
        with suppress(ray.exceptions.RayError, OSError):
            if self.why_ended() is None:
                os.kill(ray.get(self._pid, timeout=1), signal.SIGKILL)
        with suppress(ray.exceptions.RayError):
            ray.kill(self._actor)


class RankActors:
    """A `Launcher`."""

    def __init__(self, group: PlacementGroup, bundles: Sequence[Mapping[str, float]]) -> None:
        self._group = group
        self._bundles = bundles

    def launch(self, summons: Summons, device: str | None) -> RankActor:
        bundle = self._bundles[summons.rank]
        rank = ray.remote(Rank).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=summons.rank
            ),
        )
        return RankActor(rank.remote(), summons)


def rank_actors(placement: Placement) -> RankActors:
    """Of the replica that calls. Raises ConfigError where it is in no placement group."""
    group = get_current_placement_group()
    if group is None or not placement.bundles:
        raise ConfigError("tensor_parallel_size: this replica has no placement group for its ranks")
    return RankActors(group, placement.bundles)
