"""The pinned draw of `runner/sampler.py` on a GPU: one kernel, nothing waits for it.

A twin: the same ids but where exp or a sum differs in the last bit right at a boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchweave_ray.kernels.triton.sampling import sample
from torchweave_ray.runner.device import upload
from torchweave_ray.runner.sampler import MIN_TEMPERATURE, Draw
from torchweave_ray.runner.sampling.philox import uniforms

_BLOCK = 4096


class TritonSampler:
    """A `Sampler`."""

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Token ids [R] int64 of logits [R, V], float32, one `Draw` a row."""
        num_rows, vocab = logits.shape
        assert num_rows == len(draws)
        assert logits.stride(1) == 1
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        if num_rows:
            params = upload(_params(draws), logits.device)
            sample[(num_rows,)](
                out, logits, params, logits.stride(0), num_rows, vocab, _BLOCK, num_warps=8
            )
        return out


def _params(draws: Sequence[Draw]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    seeds = np.array([draw.seed for draw in draws], dtype=np.uint64)
    indices = np.array([draw.output_index for draw in draws], dtype=np.uint64)
    each = [draw.sampling for draw in draws]
    return np.array(
        [
            [0.0 if p.is_greedy else max(p.temperature, MIN_TEMPERATURE) for p in each],
            [p.top_k for p in each],
            [p.top_p for p in each],
            [p.min_p for p in each],
            uniforms(seeds, indices),
        ]
    )
