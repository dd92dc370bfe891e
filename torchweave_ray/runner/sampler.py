"""The pinned draw: processed logits and one uniform a row -> one token id a row.

Owns the definition below, which native and Triton samplers repeat as twins. Knows neither
sequences nor penalties: `runner/logits.py` has edited the logits before.

Let l be a row of float32 logits, l_max its largest. A row whose l_max is not finite has no draw.

* temperature 0: the lowest id with l_i = l_max.
* otherwise weights w_i = exp((l_i - l_max) / temperature), float32; w of l_max is 1. Then,
  each filter setting the weight of what it drops to 0:
    1. top_k (1 .. V-1): keep i iff l_i >= the k-th largest logit, so ties with it stay;
    2. top_p (< 1): keep i iff the sum of weights strictly greater than w_i < top_p * total, total
       over what (1) kept; sums in float64. Ties are kept or dropped together;
    3. min_p (> 0): keep i iff w_i >= min_p.
* c = cumulative sum of weights in id order, float64, one after the other; u = the Philox uniform
  of (seed, output index); the token is the first id with c_i > u * c_last, or, where rounding
  leaves none, the last id of positive weight.

temperature and min_p are rounded to float32; temperatures below 2**-100 count as 2**-100. A row's
result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchweave_ray.runner.sampling.philox import uniforms
from torchweave_ray.sampling_params import SamplingParams

NO_TOKEN = -1
"""Stands where a row has no draw: a logit is NaN or +inf, or no token is allowed."""
NOTHING_ALLOWED = -2
"""In its place from a sampler that can tell: all logits are -inf."""

MIN_TEMPERATURE = 2.0**-100
_NUM_LIKELIEST = (256, 4096)
"""top_p looks at so many of the likeliest tokens before it sorts a row whole."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is drawn with."""

    sampling: SamplingParams
    seed: int
    output_index: int


Sampler = Callable[[Tensor, Sequence[Draw]], Tensor | list[int]]
"""`sample` below, or a twin of it; a tensor [R] int64 where the device computes it still."""


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Token ids of logits [R, V], float32, one `Draw` a row; NO_TOKEN where there is none."""
    assert logits.shape[0] == len(draws)
    if not draws:
        return []
    l_max, token_ids = logits.max(dim=-1)
    random = [i for i, d in enumerate(draws) if not d.sampling.is_greedy]
    if random:
        rows = logits if len(random) == len(draws) else logits[random]
        token_ids[random] = _draw_rows(rows, l_max[random], [draws[i] for i in random])
    token_ids = torch.where(torch.isfinite(l_max), token_ids, NO_TOKEN)
    ids: list[int] = token_ids.tolist()
    return ids


def _draw_rows(logits: Tensor, l_max: Tensor, draws: Sequence[Draw]) -> Tensor:
    seeds = np.array([d.seed for d in draws], dtype=np.uint64)
    indices = np.array([d.output_index for d in draws], dtype=np.uint64)
    params = [d.sampling for d in draws]
    device = logits.device
    return draw(
        logits,
        l_max,
        torch.tensor([p.temperature for p in params], device=device),
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        torch.from_numpy(uniforms(seeds, indices)).to(device),
    )


def draw(
    logits: Tensor,
    l_max: Tensor,
    temperature: Tensor,
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    u: Tensor,
) -> Tensor:
    """Ids [R] int64 from logits [R, V]; l_max, temperature [R] float32; u [R] float64.

    Filters that are off in all rows cost nothing. Rows with l_max not finite give any id.
    """
    weights = logits - l_max[:, None]
    weights /= temperature.clamp(min=MIN_TEMPERATURE)[:, None]
    weights.exp_()
    _keep_top_k(weights, logits, top_k)
    _keep_top_p(weights, top_p)
    _keep_min_p(weights, min_p)
    cumulative = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    totals = cumulative[:, -1:].contiguous()
    token_ids = torch.searchsorted(cumulative, u[:, None] * totals, right=True)
    last_ids = torch.searchsorted(cumulative, totals)  # where the sum reaches its end
    last_ids.clamp_(max=logits.shape[1] - 1)  # a row of NaN reaches it nowhere
    return torch.minimum(token_ids, last_ids)[:, 0]


def _keep_top_k(weights: Tensor, logits: Tensor, top_k: Sequence[int]) -> None:
    rows = [i for i, k in enumerate(top_k) if 0 < k < logits.shape[1]]
    if not rows:
        return
    ks = torch.tensor([top_k[i] for i in rows], device=logits.device)
    picked = logits if len(rows) == len(top_k) else logits[rows]
    largest = picked.topk(int(ks.max()), dim=-1).values
    kth = largest.gather(1, ks[:, None] - 1)
    _zero(weights, rows, picked < kth)


def _keep_top_p(weights: Tensor, top_p: Sequence[float]) -> None:
    rows = [i for i, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return
    picked = weights if len(rows) == len(top_p) else weights[rows]
    shares = torch.tensor([top_p[i] for i in rows], dtype=torch.float64, device=weights.device)
    targets = shares * torch.cumsum(picked, dim=-1, dtype=torch.float64)[:, -1]
    lowest = torch.zeros_like(picked[:, 0])
    left = torch.arange(len(rows), device=weights.device)
    for num in (*(n for n in _NUM_LIKELIEST if n < picked.shape[1]), picked.shape[1]):
        lowest[left], reached = _lowest_kept(picked[left], targets[left], num)
        left = left[~reached]
        if not left.numel():
            break
    _zero(weights, rows, picked < lowest[:, None])


def _lowest_kept(weights: Tensor, targets: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The smallest weight that top_p keeps, seen in the `num` largest, and whether it is final.

    Every `num` adds the same weights in the same order, so all agree to the last bit.
    """
    ordered = weights.topk(num, dim=-1).values
    sums = torch.cumsum(ordered, dim=-1, dtype=torch.float64)
    before = F.pad(sums[:, :-1], (1, 0))  # the sum of those greater, at the first of a tie
    num_kept = (before < targets[:, None]).sum(dim=-1).clamp(min=1)
    lowest = ordered.gather(1, num_kept[:, None] - 1)[:, 0]
    return lowest, sums[:, -1] >= targets


def _keep_min_p(weights: Tensor, min_p: Sequence[float]) -> None:
    rows = [i for i, p in enumerate(min_p) if p > 0.0]
    if not rows:
        return
    picked = weights if len(rows) == len(min_p) else weights[rows]
    floors = torch.tensor([min_p[i] for i in rows], device=weights.device)
    _zero(weights, rows, picked < floors[:, None])


def _zero(weights: Tensor, rows: Sequence[int], dropped: Tensor) -> None:
    if len(rows) == weights.shape[0]:
        weights.masked_fill_(dropped, 0.0)
    else:
        weights[rows] = weights[rows].masked_fill_(dropped, 0.0)
