"""Rank 0's executor, KV cache and runner: each does its own part and has the others do theirs.

The engine sees a `ModelRunner` like any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV, StepInputs
from torchweave_ray.engine.plan import PendingStep, StepPlan, StepResult
from torchweave_ray.errors import EngineDead
from torchweave_ray.models.spec import Executor
from torchweave_ray.parallel.collectives import Collectives
from torchweave_ray.parallel.ranks import INTERRUPTED, Ranks
from torchweave_ray.parallel.step_message import packed
from torchweave_ray.runner.kv_cache import KVCache, KVShape
from torchweave_ray.runner.model_runner import ModelRunner


class LeadingExecutor:
    """An `Executor` of all ranks."""

    def __init__(self, own: Executor, ranks: Ranks, collectives: Collectives) -> None:
        self.name = f"{own.name} tp{collectives.num_ranks}"
        self._own = own
        self._ranks = ranks
        self._collectives = collectives

    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`: [R, vocab_size] float32. Raises EngineDead."""
        return self._together("forward", self._own.forward, inputs, kv)

    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        return self._together("hidden", self._own.hidden, inputs, kv)

    @torch.inference_mode()
    def _together(
        self,
        do: str,
        own: Callable[[StepInputs, Sequence[LayerKV]], Tensor],
        inputs: StepInputs,
        kv: Sequence[LayerKV],
    ) -> Tensor:
        header, piece = packed(inputs)
        try:
            self._ranks.tell(do, inputs=header)
            self._collectives.broadcast(piece)
            return own(inputs, kv)
        except EngineDead:
            raise
        except Exception as error:
            raise self._ranks.failure(error, "a step failed on rank 0") from error
        except BaseException:  # Ctrl-C: the others are in the middle of it
            self._ranks.end(INTERRUPTED)
            raise


class LeadingKVCache(KVCache):
    """The same blocks on all ranks, each with its own heads."""

    def __init__(self, ranks: Ranks, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        self._ranks = ranks
        self._opening = {
            "num_blocks": num_blocks,
            "num_layers": shape.num_layers,
            "places": [list(place) for place in shape.places],
        }
        super().__init__(shape, num_blocks, device)

    def open(self) -> None:
        """Raises torch.OutOfMemoryError if it fits not everywhere."""
        self._ranks.tell("open_cache", **self._opening)
        try:
            super().open()
        finally:
            self._ranks.answers()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            self._ranks.tell("copy_blocks", pairs=[list(pair) for pair in pairs])
        super().copy_blocks(pairs)

    def close(self) -> None:
        super().close()
        self._ranks.call("close_cache")


class LeadingRunner(ModelRunner):
    """Fails once a rank is gone; ends them when it is closed or forgotten."""

    ranks: Ranks

    def follow(self, ranks: Ranks) -> LeadingRunner:
        self.ranks = ranks
        weakref.finalize(self, ranks.close)
        return self

    def submit(self, plan: StepPlan) -> PendingStep:
        self.ranks.check()
        return _CheckedStep(super().submit(plan), self.ranks)

    def check_health(self) -> None:
        self.ranks.check()

    def close(self) -> None:
        self.reset()
        self.ranks.close()
        KVCache.close(self.kv_cache)  # its own part: the others are gone


class _CheckedStep:
    """What a GPU still computed when a rank went is worth nothing."""

    def __init__(self, step: PendingStep, ranks: Ranks) -> None:
        self._step = step
        self._ranks = ranks

    def result(self) -> StepResult:
        result = self._step.result()
        self._ranks.check()
        return result
