"""A rank that is not 0: a process that holds a slice and does what rank 0 says.

Started by a `Launcher`; `python -m torchweave_ray.parallel.rank` reads its Summons from its input.
It ends when rank 0 does, also in the middle of a collective.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.models.artifact import read_manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.parallel.channel import Channel, Message, connect
from torchweave_ray.parallel.collectives import Collectives
from torchweave_ray.parallel.launch import Summons
from torchweave_ray.parallel.opening import open_slice, slice_shape
from torchweave_ray.parallel.ranks import BEAT_S, START_S
from torchweave_ray.parallel.slices import Slice, sliced_spec
from torchweave_ray.parallel.step_message import num_bytes, unpacked
from torchweave_ray.runner.backends import choose_kernels
from torchweave_ray.runner.device import (
    free_memory,
    release_cached_memory,
    resolve_device,
    resolve_dtype,
    set_num_threads,
)
from torchweave_ray.runner.kv_cache import KVCache, KVShape

_GOES_ON_AFTER = (ConfigError, ArtifactError, torch.OutOfMemoryError)


def serve(summons: Summons) -> None:
    """Until rank 0 is gone. Raises what went wrong in a step."""
    channel = connect(summons.port, START_S)
    channel.send({"rank": summons.rank, "key": summons.key})
    threading.Thread(target=_beat, args=(channel,), name="beat", daemon=True).start()
    rank = Rank(summons.rank)
    while (message := channel.receive()) is not None:
        try:
            answer = getattr(rank, "on_" + message.pop("do"))(**message)
        except _GOES_ON_AFTER as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except BaseException as error:
            channel.send({"failed": repr(error)})
            raise
        if answer is not None:
            channel.send(answer)


def _beat(channel: Channel) -> None:
    """While the process lives and rank 0 hears it."""
    while True:
        try:
            channel.send({"beat": True})
        except OSError:
            os._exit(1)  # this rank may be waiting for it in a collective
        time.sleep(BEAT_S)


class Rank:
    """One method for each thing that it may be told; what one returns is the answer."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._collectives: Collectives | None = None
        self._executor: TorchExecutor | None = None
        self._cache: KVCache | None = None
        self._shape: KVShape | None = None
        self._device = torch.device("cpu")

    def on_open(
        self, directory: str, config: dict[str, Any], num_ranks: int, kv_dtype: str
    ) -> Message:
        engine = EngineConfig.from_dict(config)
        self._device = resolve_device(engine.runner.device)
        folder = Path(directory)
        manifest = read_manifest(folder)
        model = ModelConfig.read(folder)
        kernels = choose_kernels(self._device, engine)
        placement = Placement(
            resolve_dtype(engine.runner.dtype, manifest.dtype),
            self._device,
            set_num_threads(engine.runner.threads),
            ops=kernels.ops,
        )
        if self._collectives is None:
            self._collectives = Collectives(self._rank, num_ranks, self._device)
        self._executor = open_slice(
            folder, model, manifest, placement, kernels.attention, self._collectives
        )
        spec = sliced_spec(model, Slice(self._rank, num_ranks))
        self._shape = slice_shape(spec, engine.cache.block_size, getattr(torch, kv_dtype))
        return {}

    def on_join(self, port: int) -> Message:
        assert self._collectives is not None
        self._collectives.join(port)
        return {}

    def on_free_memory(self) -> Message:
        return {"bytes": free_memory(self._device)}

    def on_open_cache(
        self, num_blocks: int, num_layers: int, places: list[tuple[int, int]]
    ) -> Message:
        assert self._shape is not None
        self._cache = None
        shape = replace(self._shape, num_layers=num_layers, places=tuple(places))
        self._cache = KVCache(shape, num_blocks, self._device)
        return {}

    def on_close_cache(self) -> Message:
        self._cache = None
        release_cached_memory()
        return {}

    def on_release(self) -> Message:
        self._executor = self._cache = None
        release_cached_memory()
        return {}

    def on_copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        assert self._cache is not None
        self._cache.copy_blocks(pairs)

    def on_forward(self, inputs: dict[str, Any]) -> None:
        assert self._executor is not None
        assert self._cache is not None
        self._executor.forward(self._received(inputs), self._cache.layers)

    def on_hidden(self, inputs: dict[str, Any]) -> None:
        assert self._executor is not None
        assert self._cache is not None
        self._executor.hidden(self._received(inputs), self._cache.layers)

    def _received(self, header: dict[str, Any]) -> Any:
        assert self._collectives is not None
        piece = torch.empty(num_bytes(header), dtype=torch.uint8, device=self._device)
        self._collectives.broadcast(piece)
        return unpacked(header, piece)


if __name__ == "__main__":
    serve(Summons(**json.load(sys.stdin)))
