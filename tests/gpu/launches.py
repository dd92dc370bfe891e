"""Launches every kernel, in the shapes of real models, for the capability that the command line
names; prints the shared memory that each takes. No test in here: test_compiles.py runs it."""

from __future__ import annotations

import json
import sys

import torch

from tests.attention_case import Case
from tests.gpu.compile_only import compile_only
from torchweave_ray.attention.base import AttentionShape, LayerKV, quantize_kv

BF16 = torch.bfloat16
SHAPES = (
    AttentionShape(32, 4, 64, 0.125),
    AttentionShape(32, 8, 128, 0.1, sliding_window=4096, soft_cap=30.0),
    AttentionShape(8, 1, 256, 0.1),
)


def launch_attention() -> None:
    from torchweave_ray.attention.triton_paged import TritonPagedAttention

    kinds = [(BF16, BF16), (BF16, torch.int8), (torch.float32, torch.float32)]
    for shape in SHAPES:
        for dtype, kv_dtype in kinds:
            case = Case(shape, [(300, 1), (3, 40)])
            keys, values = case.kv.keys, case.kv.values
            if kv_dtype == torch.int8:
                (keys, key_scales), (values, value_scales) = quantize_kv(keys), quantize_kv(values)
                case.kv = LayerKV(keys, values, key_scales, value_scales)
            else:
                case.kv = LayerKV(keys.to(dtype), values.to(dtype))
            case.queries = case.queries.to(dtype)
            case.run(TritonPagedAttention())


def main() -> None:
    active = compile_only(int(sys.argv[1]))
    launch_attention()
    print(json.dumps(active.compiled))


if __name__ == "__main__":
    main()
