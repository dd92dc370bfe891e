"""The layout that the products read: panels of 32 output columns, pairs of inputs side by side.

Pure functions of tensors: packing at load and packing in the optimizer give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchweave_ray.kernels.structs import PANEL

_HALF = PANEL // 2
LAYOUT = f"bf16-panels-{PANEL}"
"""Names the bytes that `pack_linear` gives, for files that hold them. All instruction sets read the
same; a change of the bytes is a new name."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [n, k] in bf16, zero-padded to whole panels and pairs."""

    data: Tensor  # [ceil(n / 32), ceil(k / 2), 32, 2] bf16
    n: int
    k: int
    gated: bool = False
    """Panels hold 16 gate columns and the 16 up columns that they multiply. n counts both."""

    @property
    def num_outputs(self) -> int:
        return self.n // 2 if self.gated else self.n


def packed_shape(n: int, k: int, gated: bool = False) -> tuple[int, int, int, int]:
    """Of the packed data of a weight [n, k]."""
    rows = 2 * -(-(n // 2) // _HALF) * _HALF if gated else n
    return (-(-rows // PANEL), -(-k // 2), PANEL, 2)


def pack_linear(weight: Tensor, gated: bool = False) -> PackedLinear:
    """Pack weight [n, k]; `gated`: its first half of rows are gates, the second their ups."""
    n, k = weight.shape
    rows = _interleave(weight) if gated else weight
    num_panels, num_pairs = -(-rows.shape[0] // PANEL), -(-k // 2)
    padded = torch.zeros(num_panels * PANEL, num_pairs * 2, dtype=torch.bfloat16)
    padded[: rows.shape[0], :k] = rows
    # A pair of bf16 moves as one int32.
    pairs = padded.view(torch.int32).view(num_panels, PANEL, num_pairs)
    data = pairs.transpose(1, 2).contiguous().view(torch.bfloat16)
    return PackedLinear(data.view(num_panels, num_pairs, PANEL, 2), n, k, gated)


def unpack_linear(packed: PackedLinear) -> Tensor:
    """The weight [n, k] again, bf16."""
    num_panels, num_pairs = packed.data.shape[:2]
    rows = packed.data.transpose(1, 2).reshape(num_panels * PANEL, num_pairs * 2)[:, : packed.k]
    if not packed.gated:
        return rows[: packed.n].contiguous()
    halves = rows.view(num_panels, 2, _HALF, packed.k).transpose(0, 1)
    return torch.cat([half.reshape(-1, packed.k)[: packed.n // 2] for half in halves])


def pack_bias(bias: Tensor, gated: bool = False) -> Tensor:
    """fp32, in the order of the packed columns, zero-padded to whole panels."""
    rows = (_interleave(bias[:, None]) if gated else bias[:, None])[:, 0]
    padded = torch.zeros(-(-rows.shape[0] // PANEL) * PANEL)
    padded[: rows.shape[0]] = rows
    return padded


def pack_norm(weight: Tensor, offset: float = 0.0) -> Tensor:
    """weight + offset in fp32, zero-padded to whole panels."""
    padded = torch.zeros(-(-weight.shape[0] // PANEL) * PANEL)
    padded[: weight.shape[0]] = weight.float() + offset
    return padded


def _interleave(rows: Tensor) -> Tensor:
    """[2 m, k] -> 16 rows of the first half, their 16 of the second, and so on; m padded to 16."""
    half, k = rows.shape[0] // 2, rows.shape[1]
    groups = -(-half // _HALF)
    padded = torch.zeros(2, groups * _HALF, k, dtype=rows.dtype)
    padded[0, :half], padded[1, :half] = rows[:half], rows[half:]
    return padded.view(2, groups, _HALF, k).transpose(0, 1).reshape(-1, k)
