"""A model on several ranks, opened: what build.py wires in place of one executor's parts."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchweave_ray.attention.base import AttentionBackend
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ConfigError
from torchweave_ray.models.artifact import Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement
from torchweave_ray.models.spec import DecoderSpec
from torchweave_ray.parallel.collectives import Collectives
from torchweave_ray.parallel.launch import Children, Launcher, visible_devices
from torchweave_ray.parallel.leader import LeadingExecutor, LeadingKVCache, LeadingRunner
from torchweave_ray.parallel.opening import check_ranks, open_slice
from torchweave_ray.parallel.ranks import Ranks
from torchweave_ray.parallel.slices import Slice, sliced_spec
from torchweave_ray.runner.device import free_memory, num_gpus
from torchweave_ray.runner.opening import RunnerParts


class RankGroup:
    """Its processes live from the first executor on until the runner is closed."""

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        manifest: Manifest,
        config: EngineConfig,
        placement: Placement,
        attention: AttentionBackend,
        kv_dtype: torch.dtype,
        launcher: Launcher | None = None,
        has_file: bool = True,
    ) -> None:
        """`launcher`: None: children of this process. Raises as `check_ranks`."""
        check_ranks(config, model, manifest, has_file)
        self._directory = directory
        self._model = model
        self._manifest = manifest
        self._config = config
        self._placement = placement
        self._attention = attention
        self._kv_dtype = kv_dtype
        self._launcher = launcher
        self._collectives = Collectives(0, config.tensor_parallel_size, placement.device)
        self._ranks: Ranks | None = None

    @property
    def spec(self) -> DecoderSpec:
        return sliced_spec(self._model, Slice(0, self._collectives.num_ranks))

    def open_executor(self) -> LeadingExecutor:
        """All ranks load their slices at the same time. Raises ConfigError or ArtifactError with
        what one of them could not do."""
        is_new = self._ranks is None
        ranks = self._ranks = self._ranks or self._start()
        try:
            ranks.tell("open", **self._order())
            own = open_slice(
                self._directory,
                self._model,
                self._manifest,
                self._placement,
                self._attention,
                self._collectives,
            )
            ranks.answers()
            if is_new:
                ranks.join()
        except BaseException:
            ranks.close()
            raise
        return LeadingExecutor(own, ranks, self._collectives)

    def release(self) -> None:
        """The others' weights; rank 0's are whoever's that holds its executor."""
        assert self._ranks is not None
        self._ranks.call("release")

    def runner_parts(self) -> RunnerParts:
        assert self._ranks is not None, "there is an executor first"
        ranks = self._ranks

        def runner(*args: Any) -> LeadingRunner:
            return LeadingRunner(*args).follow(ranks)

        return RunnerParts(self._free_memory, partial(LeadingKVCache, ranks), runner)

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()

    def _start(self) -> Ranks:
        if self._launcher is not None:
            return Ranks(self._launcher, self._collectives, None)
        if self._placement.device.type == "cpu":
            return Ranks(Children(), self._collectives, None)
        wanted, found = self._collectives.num_ranks, num_gpus()
        if found < wanted:
            raise ConfigError(
                f"tensor_parallel_size {wanted} needs {wanted} GPUs, torch sees {found}"
            )
        return Ranks(Children(), self._collectives, visible_devices(found))

    def _order(self) -> dict[str, Any]:
        runner = replace(self._config.runner, threads=self._placement.num_threads)
        return {
            "directory": str(self._directory.absolute()),
            "config": asdict(replace(self._config, runner=runner)),
            "num_ranks": self._collectives.num_ranks,
            "kv_dtype": str(self._kv_dtype).removeprefix("torch."),
        }

    def _free_memory(self, device: torch.device) -> int:
        """For each rank: they share a machine's memory, and have a GPU each."""
        assert self._ranks is not None
        if device.type == "cpu":
            return free_memory(device) // self._collectives.num_ranks
        others: list[int] = [answer["bytes"] for answer in self._ranks.call("free_memory")]
        return min(free_memory(device), *others)
