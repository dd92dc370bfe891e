"""Philox4x32-10, the counter-based generator behind every draw.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11), Random123's constants.
Knows no tokens: it maps (seed, index) to one uniform, so a draw never depends on the batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint64(0x9E3779B9)
_W1 = np.uint64(0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds on words: counter [4, N], key [2, N], 32 bits each in uint64 -> [4, N]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(_ROUNDS):
        if i:
            k0 = (k0 + _W0) & _MASK
            k1 = (k1 + _W1) & _MASK
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
    return np.stack([c0, c1, c2, c3])


def uniforms(seeds: NDArray[np.uint64], indices: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One double per (seed, output index), both [N].

    Counter (index, 0, 0, 0); key (low word of the seed, high word). With the first two output
    words u = (((x0 << 32 | x1) >> 11) + 0.5) * 2**-53, in double arithmetic: never 0, and 1 only
    where the sum rounds up to 2**53 (one draw in 2**53).
    """
    zeros = np.zeros_like(indices)
    counter = np.stack([indices & _MASK, zeros, zeros, zeros])
    key = np.stack([seeds & _MASK, seeds >> _SHIFT])
    x0, x1, _, _ = philox4x32(counter, key)
    mantissas = (((x0 << _SHIFT) | x1) >> np.uint64(11)).astype(np.float64)
    u: NDArray[np.float64] = (mantissas + 0.5) * 2.0**-53
    return u
