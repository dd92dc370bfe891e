"""x @ weight.T with torch, in the order of operands that is quicker on the device at hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_FEW_ROWS = range(2, 33)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in_features], weight [out_features, in_features] -> [T, out_features].

    In fp32 on a CPU, MKL shares out the rows of the left operand among its threads; with a step's
    few tokens there the threads starve, so the weight goes left (1.2 to 4 times quicker, measured
    on 2 cores at 2 to 32 tokens; bf16 takes another path, where the order does not matter).
    """
    if x.shape[0] in _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu":
        product = torch.mm(weight, x.t()).t().contiguous()
        return product if bias is None else product.add_(bias)
    return functional.linear(x, weight, bias)
