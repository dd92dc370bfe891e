"""Rounding that makes up for its own errors: GPTQ, for the formats of our kernels.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323): inputs are rounded one after another, and what each one loses is taken out of
those that follow, as the second moments of a calibration text's activations say. Reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchweave_ray.kernels.quantization import (
    GROUP,
    ZERO,
    QuantizedFormat,
    QuantizedLinear,
    quantize,
)

DAMPING = 0.01
"""Of the mean second moment, added to each: a text says little about inputs that it seldom uses."""
_BLOCK = GROUP
"""Inputs whose corrections to all later ones are applied in one product."""
_ROWS = 1024
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Ranges of a 4-bit group that are tried: a few clipped weights may cost less than coarse steps."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a product's inputs over a text: the sum of x x', [k, k] fp64."""

    total: Tensor

    @staticmethod
    def of(inputs: Tensor) -> Moments:
        """`inputs` [T, k] fp32."""
        k = inputs.shape[1]
        total = torch.zeros(k, k, dtype=torch.float64)
        for start in range(0, inputs.shape[0], _ROWS):
            rows = inputs[start : start + _ROWS]
            total += rows.T @ rows
        return Moments(total)

    def energy(self, weight: Tensor) -> float:
        """Squared norm of the product's result over the text, for a weight [n, k]."""
        total = self.total.float()
        parts = [
            ((rows @ total) * rows).sum(dtype=torch.float64) for rows in torch.split(weight, _ROWS)
        ]
        return float(torch.stack(parts).sum())

    def factor(self) -> Tensor:
        """Upper Cholesky factor of the damped inverse, [k, k] fp32: row i says by how much inputs
        i.. must move for what input i loses."""
        damped = self.total.clone()
        diagonal = damped.diagonal()
        mean = float(diagonal.mean())
        diagonal += DAMPING * mean if mean > 0.0 else 1.0
        del diagonal
        lower = torch.linalg.cholesky(damped)
        del damped  # with many inputs each of these is what memory is needed for
        inverse = torch.cholesky_inverse(lower)
        del lower
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        del inverse
        return factor.float()


def quantize_compensating(
    weight: Tensor, factor: Tensor, format: QuantizedFormat
) -> QuantizedLinear:
    """A weight [n, k] of any float dtype; `factor` of its inputs' `Moments`."""
    n, k = weight.shape
    left = weight.float().T.contiguous()  # [k, n]: an input's weights lie side by side
    codes = torch.empty(k, n, dtype=torch.uint8)
    grids = [_grid(left, format)] if format == "int8" else []
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        errors = torch.empty(end - start, n)
        for i in range(start, end):
            if format != "int8" and i % GROUP == 0:
                grids.append(_grid(left[i : i + GROUP], format))
            codes[i], rounded = grids[-1].round(left[i])
            error = (left[i] - rounded) / factor[i, i]
            errors[i - start] = error
            left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    scales = torch.stack([grid.scales for grid in grids], dim=1)
    mins = torch.stack([grid.mins for grid in grids], dim=1)
    return QuantizedLinear(
        format,
        codes.T.contiguous(),
        scales[:, 0].contiguous() if format == "int8" else scales.half(),
        mins.half() if format == "int4-group32" else None,
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    """The values that some inputs of each output may take: code * scale + min."""

    scales: Tensor  # [n] fp32, of fp16's values in groups
    mins: Tensor
    lowest: int
    highest: int
    zero: int
    """Added to a code that is stored."""

    def round(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of weights [..., n]."""
        ratios = torch.where(self.scales == 0, 0.0, (weights - self.mins) / self.scales)
        codes = ratios.round_().clamp_(self.lowest, self.highest)
        return (codes + self.zero).to(torch.uint8), codes * self.scales + self.mins


def _grid(weights: Tensor, format: QuantizedFormat) -> _Grid:
    """For weights [inputs, n] that share a scale an output."""
    if format != "int4-group32":
        scales = quantize(weights.T, format).scales.float().reshape(weights.shape[1], -1)[:, 0]
        return _Grid(scales, torch.zeros_like(scales), -127, 127, ZERO)
    low, high = weights.amin(dim=0), weights.amax(dim=0)
    best, least = None, None
    for shrink in _SHRINKS:
        middle, half = (low + high) / 2, (high - low) / 2 * shrink
        mins = (middle - half).half().float()
        scales = ((middle + half - mins).clamp_(min=0) / 15).half().float()
        grid = _Grid(scales, mins, 0, 15, 0)
        error = (grid.round(weights)[1] - weights).square_().sum(dim=0)
        if best is None or least is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = _Grid(
            torch.where(better, scales, best.scales),
            torch.where(better, mins, best.mins),
            *(0, 15, 0),
        )
    assert best is not None
    return best
