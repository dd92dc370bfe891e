"""The arithmetic of a decoder's ops on our Triton kernels: `models.ops.Ops` by shape.

Products of plain weights are the vendor's unless rows must not depend on their batch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional

from torchweave_ray.attention.base import AttentionShape, HeadNorms, LayerKV, StepInputs
from torchweave_ray.kernels.quantization import QuantizedLinear
from torchweave_ray.kernels.triton import linear as products
from torchweave_ray.kernels.triton.activation import gated
from torchweave_ray.kernels.triton.norm import rms_norm
from torchweave_ray.kernels.triton.rope import rotate_and_write

_FORMATS = {
    "int8": products.INT8,
    "fp8": products.FP8,
    "int8-group32": products.GROUP_INT8,
    "int4-group32": products.GROUP_INT4,
}
_COLUMNS = 1024
"""Of a gated activation, by one program."""
_FEW_ROWS = 64


class TritonOps:
    def __init__(self, batch_invariant: bool = False) -> None:
        """`batch_invariant`: a row's bits do not depend on the other rows of its batch."""
        self._batch_invariant = batch_invariant
        self.name = "triton-invariant" if batch_invariant else "triton"

    def linear(self, x: Tensor, weight: Tensor | QuantizedLinear, bias: Tensor | None) -> Tensor:
        if isinstance(weight, Tensor) and not self._batch_invariant:
            return functional.linear(x, weight, bias)
        codes = weight if isinstance(weight, Tensor) else weight.codes
        scales = mins = codes
        format = products.PLAIN
        if isinstance(weight, QuantizedLinear):
            scales, mins = weight.scales, weight.scales if weight.mins is None else weight.mins
            format = _FORMATS[weight.format]
        (m, k), n = x.shape, codes.shape[0]
        out = torch.empty((m, n), dtype=x.dtype, device=x.device)
        if m == 0:
            return out
        block_m, block_n, block_k = self._tile(m, n, k, x.element_size())
        products.linear[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
            out, x, codes, scales, mins, out if bias is None else bias, m, n, k, x.stride(0),
            block_m, block_n, block_k, format.value, bias is not None,
            num_warps=4 if block_m <= _FEW_ROWS else 8,
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._norm(out, x, x, weight, eps, offset)
        return out

    def add_rms_norm(
        self, hidden: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
    ) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._norm(out, hidden, x, weight, eps, offset, before=True)
        return out

    def rms_norm_add(
        self, hidden: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
    ) -> None:
        self._norm(hidden, hidden, x, weight, eps, offset, behind=True)

    def gated(self, x: Tensor, kind: str) -> Tensor:
        rows, size = x.shape[0], x.shape[1] // 2
        out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
        if rows:
            gated[(rows, triton.cdiv(size, _COLUMNS))](
                out, x, x.stride(0), size, kind == "gelu_tanh", _COLUMNS
            )
        return out

    def rotate_and_write(
        self,
        qkv: Tensor,
        shape: AttentionShape,
        rotation: tuple[Tensor, Tensor] | None,
        norms: HeadNorms,
        kv: LayerKV,
        inputs: StepInputs,
    ) -> Tensor:
        num_tokens, num_all, head_dim = qkv.shape
        queries = torch.empty(
            (num_tokens, shape.num_heads, head_dim), dtype=qkv.dtype, device=qkv.device
        )
        if num_tokens == 0:
            return queries
        cos, sin = rotation or (qkv, qkv)
        rotary_dim = 0 if rotation is None else cos.shape[-1]
        weights = [qkv if norm is None else norm for norm in (norms.queries, norms.keys)]
        is_int8 = kv.key_scales is not None
        scales = (kv.key_scales, kv.value_scales) if is_int8 else (kv.keys, kv.values)
        rotate_and_write[(num_tokens, num_all)](
            queries, qkv, *weights, cos, sin, kv.keys, kv.values, *scales,
            inputs.slots_of(kv.group), qkv.stride(0), norms.eps, norms.offset, shape.num_heads,
            shape.num_kv_heads, head_dim, triton.next_power_of_2(head_dim), rotary_dim,
            kv.keys.shape[2],
            norms.queries is not None, norms.keys is not None, is_int8,
            num_warps=1,
        )  # fmt: skip
        return queries

    def _norm(
        self,
        out: Tensor,
        hidden: Tensor,
        x: Tensor,
        weight: Tensor,
        eps: float,
        offset: float,
        before: bool = False,
        behind: bool = False,
    ) -> None:
        rows, columns = x.shape
        block = triton.next_power_of_2(columns)
        if rows:
            rms_norm[(rows,)](
                out, hidden, x, weight, x.stride(0), columns, eps, offset, block, before, behind,
                num_warps=min(8, max(1, block // 512)),
            )  # fmt: skip

    def _tile(self, m: int, n: int, k: int, size: int) -> tuple[int, int, int]:
        """Rows, columns and inputs of a program. Few rows read weights: many narrow programs."""
        block_k = 128 if size <= 2 else 32
        if self._batch_invariant or m <= 16:
            return 16, 32, block_k
        if m <= _FEW_ROWS:
            return 64, 64, min(block_k, 64)
        return 128, 128, 32
