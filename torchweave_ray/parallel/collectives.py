"""Sums, gathers and broadcasts of tensors among the ranks of one replica: NCCL's, or gloo's.

Process groups of our own, not torch's global one, which belongs to the process that `LLM` is used
in. Knows no model.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from torchweave_ray.parallel.channel import HOST

dist: Any = torch.distributed
"""Its stubs leave out half of it."""
TIMEOUT_S = 60.0
"""Of one collective, where a rank lives and does not take part. Dead ones are noticed at once."""


class Collectives:
    """Of one rank. Empty until it has joined the others."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._device = device
        self._group: Any = None

    def join(self, port: int, timeout_s: float = TIMEOUT_S) -> None:
        """Wait for the others at rank 0's store. Raises RuntimeError when they do not come."""
        store = self._store(port, is_master=False)
        limit = timedelta(seconds=timeout_s)
        if self._device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()
            options._timeout = limit
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
            self._group = dist.ProcessGroupGloo(store, self.rank, self.num_ranks, options)
            return
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = limit
        self._group = dist.ProcessGroupNCCL(store, self.rank, self.num_ranks, nccl)

    @staticmethod
    def open_store() -> Any:
        """Rank 0's, on a free port."""
        return Collectives._store(0, is_master=True)

    @staticmethod
    def _store(port: int, is_master: bool) -> Any:
        limit = timedelta(seconds=TIMEOUT_S)
        return dist.TCPStore(HOST, port, is_master=is_master, wait_for_workers=False, timeout=limit)

    def sum(self, x: Tensor) -> None:
        """In place, the same bits on all ranks."""
        self._group.allreduce([x]).wait()

    def gather_columns(self, x: Tensor) -> Tensor:
        """x [R, n] of all side by side on rank 0: [R, n * num_ranks]. Others get their own."""
        if x.numel() == 0:
            return x.new_empty(x.shape[0], x.shape[1] * self.num_ranks)
        x = x.contiguous()
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.num_ranks)] if self.rank == 0 else []
        self._group.gather([parts] if parts else [], [x], options).wait()
        return torch.cat(parts, dim=1) if parts else x

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's x, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([x], options).wait()

    def abort(self) -> None:
        """End what waits for a dead rank. Any thread may call; nothing works afterwards."""
        if self._group is not None:
            self._group.abort()
