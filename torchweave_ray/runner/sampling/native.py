"""The pinned draw of `runner/sampler.py` on the CPU kernels: rows are shared out among threads.

A twin: the same ids but where torch's exp and ours differ in the last bit right at a boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweave_ray.kernels.library import Team
from torchweave_ray.kernels.structs import Draw as NativeDraw
from torchweave_ray.runner.sampler import Draw


class NativeSampler:
    """A `Sampler`. `team` must not be running anything else meanwhile."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """Token ids of logits [R, V], float32, one `Draw` a row; NO_TOKEN where there is none."""
        num_rows, vocab = logits.shape
        assert num_rows == len(draws)
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        rows = (NativeDraw * num_rows)(*(_native(draw) for draw in draws))
        ids = torch.empty(num_rows, dtype=torch.int64)
        self._team.sample(
            logits.data_ptr(), num_rows, vocab, logits.stride(0), rows, ids.data_ptr()
        )
        found: list[int] = ids.tolist()
        return found


def _native(draw: Draw) -> NativeDraw:
    p = draw.sampling
    return NativeDraw(p.top_p, draw.seed, draw.output_index, p.top_k, p.temperature, p.min_p)
