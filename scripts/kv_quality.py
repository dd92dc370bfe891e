"""What an int8 KV cache costs in quality: a staged model with it, beside bfloat16's and its source.

Backs the figures of docs/performance.md: `kv_quality.py SOURCE ARTIFACT [--save]`, the source as
the optimizer fetched it (a GGUF file or a checkpoint's folder), computed in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from optimizer.checkpoints import open_checkpoint
from optimizer.measuring.model import MeasuredModel, all_cores, open_staged
from optimizer.measuring.quality import Quality, compare, text_windows, window_logits
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.bench.origin import save_results
from torchweave_ray.models.artifact import TOKENIZER, verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.tensors import fuse, fused_tensors
from torchweave_ray.models.torch_executor import TorchExecutor


def source_in_fp32(source: Path, config: ModelConfig) -> MeasuredModel:
    checkpoint = open_checkpoint(source)
    tensors = {
        tensor.name: fuse(tensor, [checkpoint.load(name).float() for name in tensor.sources])
        for tensor in fused_tensors(config)
    }
    spec = build_spec(config)
    executor = TorchExecutor(spec, tensors, TorchPagedAttention())
    return MeasuredModel(executor, executor.name, spec, torch.float32)


def close_to(
    reference: MeasuredModel, candidate: MeasuredModel, windows: Sequence[Tensor]
) -> Quality:
    logits = [window_logits(model, windows) for model in (reference, candidate)]
    return compare(*logits, windows, candidate.executor_name)


def main() -> None:
    source, artifact = map(Path, sys.argv[1:3])
    config = ModelConfig.read(artifact)
    windows = text_windows(artifact / TOKENIZER, config.max_position_embeddings)
    with all_cores() as threads:
        fp32 = source_in_fp32(source, config)
        model = open_staged(artifact, verify_artifact(artifact), threads)
        coded = replace(model, kv_dtype=torch.int8)
        points = [
            {"reference": of, "kv_dtype": kv, **asdict(quality), "ratio": quality.perplexity_ratio}
            for of, kv, quality in (
                ("source fp32", "bfloat16", close_to(fp32, model, windows)),
                ("source fp32", "int8", close_to(fp32, coded, windows)),
                ("bfloat16 cache", "int8", close_to(model, coded, windows)),
                (
                    "source fp32",
                    "torch int8",
                    close_to(fp32, replace(fp32, kv_dtype=torch.int8), windows),
                ),
            )
        ]
    for point in points:
        print(point)
    if "--save" in sys.argv:
        print(save_results("kv-quality", {"model": artifact.name}, points))


if __name__ == "__main__":
    main()
