"""Launches every kernel, in the shapes of real models, for the capability that the command line
names; prints the shared memory that each takes. No test in here: test_compiles.py runs it."""

from __future__ import annotations

import json
import sys
from typing import get_args

import torch

from tests.attention_case import Case
from tests.gpu.compile_only import compile_only
from torchweave_ray.attention.base import AttentionShape, HeadNorms, LayerKV, quantize_kv
from torchweave_ray.kernels.quantization import QuantizedFormat, quantize
from torchweave_ray.runner.sampler import Draw
from torchweave_ray.sampling_params import SamplingParams

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


def launch_ops() -> None:
    from torchweave_ray.kernels.triton.ops import TritonOps

    ops, hidden, weight = TritonOps(), torch.zeros(2, 2048, dtype=BF16), torch.ones(2048)
    ops.rms_norm(hidden, weight, 1e-5, 0.0)
    ops.add_rms_norm(hidden, hidden.clone(), weight, 1e-5, 0.0)
    ops.rms_norm_add(hidden, hidden.clone(), weight, 1e-5, 1.0)
    for kind in ("silu", "gelu_tanh"):
        ops.gated(torch.zeros(2, 11264, dtype=BF16), kind)
    shape = SHAPES[0]
    for kv_dtype in (BF16, torch.int8):
        case = Case(shape, [(3, 2)])
        parts = [torch.zeros(case.kv.keys.shape, dtype=kv_dtype) for _ in range(2)]
        if kv_dtype == torch.int8:
            parts += [torch.zeros(case.kv.keys.shape[:3]) for _ in range(2)]
        qkv, cos = torch.zeros(2, 40, 64, dtype=BF16), torch.zeros(2, 1, 64)
        for norm in (None, torch.ones(64)):
            norms = HeadNorms(norm, norm)
            ops.rotate_and_write(qkv, shape, (cos, cos), norms, LayerKV(*parts), case.inputs)


def launch_products() -> None:
    from torchweave_ray.kernels.triton.ops import TritonOps

    weight = torch.randn(256, 512)
    weights = [quantize(weight, format) for format in get_args(QuantizedFormat)]
    for rows in (1, 64, 256):
        x = torch.zeros(rows, 512, dtype=BF16)
        for each in weights:
            TritonOps().linear(x, each, None)
        TritonOps(batch_invariant=True).linear(x, weight.to(BF16), torch.zeros(256, dtype=BF16))


def launch_sampler() -> None:
    from torchweave_ray.runner.sampling.triton import TritonSampler

    draws = [Draw(SamplingParams(), 0, 0)] * 2
    TritonSampler()(torch.zeros(2, 32000), draws)


def main() -> None:
    active = compile_only(int(sys.argv[1]))
    launch_attention()
    launch_ops()
    launch_products()
    launch_sampler()
    print(json.dumps(active.compiled))


if __name__ == "__main__":
    main()
