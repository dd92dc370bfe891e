"""The pinned draw of runner/sampler.py, one program a row, without a sort of the vocabulary.

top_k and top_p are thresholds, found by bisection over the bits of a float: at most 32 passes, each
a count or a sum over the row. Sums are in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_TOKEN = tl.constexpr(-1)
NOTHING_ALLOWED = tl.constexpr(-2)
ONE = tl.constexpr(0x3F800000)
"""The bits of 1.0, the largest weight."""


@triton.jit
def load_logits(logits, start, vocab, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    return ids, tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def ordered(x):
    """Bits of float32 as int32 in the order of the numbers, -0.0 as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def largest(logits, vocab, BLOCK: tl.constexpr):
    """(The largest logit, its lowest id, how many are NaN.)"""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    num_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids, x = load_logits(logits, start, vocab, BLOCK)
        where = tl.where(x > best, ids, where)
        best = tl.where(x > best, x, best)
        num_nan += (x != x).to(tl.int32)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, where, 2147483647), 0), tl.sum(num_nan, 0)


@triton.jit
def kth_largest(logits, vocab, k, BLOCK: tl.constexpr):
    """The k-th largest logit as `ordered` gives it."""
    low = tl.full([], -2147483648, tl.int64)
    high = tl.full([], 2147483647, tl.int64)
    while low < high:  # so many are at least `low`: k or more
        middle = (low + high + 1) >> 1
        num = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            ids, x = load_logits(logits, start, vocab, BLOCK)
            num += ((ordered(x).to(tl.int64) >= middle) & (ids < vocab)).to(tl.int32)
        is_low = tl.sum(num, 0) >= k
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle - 1)
    return low


@triton.jit
def weigh(logits, start, vocab, top, temperature, lowest, least, BLOCK: tl.constexpr):
    """[BLOCK] ids and weights; 0 below the logit `lowest` (ordered) or below the bits `least`."""
    ids, x = load_logits(logits, start, vocab, BLOCK)
    weights = tl.exp(tl.div_rn(x - top, temperature))
    kept = (ordered(x).to(tl.int64) >= lowest) & (weights.to(tl.int32, bitcast=True) >= least)
    return ids, tl.where(kept & (ids < vocab), weights, 0.0)


@triton.jit
def sum_above(logits, vocab, top, temperature, lowest, bits, BLOCK: tl.constexpr):
    """Of the weights whose bits are larger than `bits`, in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        _, weights = weigh(logits, start, vocab, top, temperature, lowest, bits + 1, BLOCK)
        total += weights.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def least_of_top_p(logits, vocab, top, temperature, lowest, top_p, BLOCK: tl.constexpr):
    """Bits of the smallest weight of which less than top_p of all lies above it."""
    target = top_p * sum_above(logits, vocab, top, temperature, lowest, -1, BLOCK)
    low = tl.full([], 0, tl.int32)
    high = tl.full([], ONE, tl.int32)
    while low < high:
        middle = (low + high) >> 1
        fits = sum_above(logits, vocab, top, temperature, lowest, middle, BLOCK) < target
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return high


@triton.jit
def pick(logits, vocab, top, temperature, lowest, least, u, BLOCK: tl.constexpr):
    """The first id at which the sum of weights exceeds u times all of it, or the last with one."""
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab, BLOCK):
        _, weights = weigh(logits, start, vocab, top, temperature, lowest, least, BLOCK)
        total += tl.sum(weights.to(tl.float64), 0)
    target, before = u * total, tl.full([], 0.0, tl.float64)
    first = tl.full([], 2147483647, tl.int32)
    last = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        ids, weights = weigh(logits, start, vocab, top, temperature, lowest, least, BLOCK)
        exact = weights.to(tl.float64)
        exceeds = (tl.cumsum(exact, 0) + before > target) & (weights > 0)
        first = tl.minimum(first, tl.min(tl.where(exceeds, ids, 2147483647), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, ids, 0), 0))
        before += tl.sum(exact, 0)
    return tl.minimum(first, last)


@triton.jit
def sample(out, logits, settings, row_stride, num_rows, vocab, BLOCK: tl.constexpr):
    """Grid (rows,): out [rows] int64. settings [5, rows] float64: temperature (0: the likeliest),
    top_k, top_p, min_p, u."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    temperature = tl.load(settings + row).to(tl.float32)
    top, likeliest, num_nan = largest(logits, vocab, BLOCK)
    token = likeliest
    if (num_nan > 0) | (top == float("inf")):
        token = tl.full([], NO_TOKEN, tl.int32)
    elif top == float("-inf"):
        token = tl.full([], NOTHING_ALLOWED, tl.int32)
    elif temperature > 0:
        k = tl.load(settings + num_rows + row).to(tl.int32)
        top_p = tl.load(settings + 2 * num_rows + row)
        min_p = tl.load(settings + 3 * num_rows + row).to(tl.float32)
        lowest = tl.full([], -2147483648, tl.int64)
        if (k > 0) & (k < vocab):
            lowest = kth_largest(logits, vocab, k, BLOCK)
        least = tl.full([], 0, tl.int32)
        if top_p < 1.0:
            least = least_of_top_p(logits, vocab, top, temperature, lowest, top_p, BLOCK)
        least = tl.maximum(least, min_p.to(tl.int32, bitcast=True))
        u = tl.load(settings + 4 * num_rows + row)
        token = pick(logits, vocab, top, temperature, lowest, least, u, BLOCK)
    tl.store(out + row, token.to(tl.int64))
