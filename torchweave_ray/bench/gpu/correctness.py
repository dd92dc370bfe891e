"""Our Triton kernels beside the torch reference on the same device: logits of mixed steps of small
models and of TinyLlama's shape, then texts with and without graphs and steps ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchweave_ray.attention.base import LayerKV
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.attention.triton_paged import TritonPagedAttention
from torchweave_ray.bench.gpu.random_model import FAMILIES, TINY, TINYLLAMA, make_artifact
from torchweave_ray.engine.plan import ScheduledSequence
from torchweave_ray.kernels.triton.ops import TritonOps
from torchweave_ray.llm import LLM
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import DecoderSpec
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights
from torchweave_ray.runner.inputs import Chunk, build_inputs
from torchweave_ray.sampling_params import SamplingParams

_BLOCK = 16
_WORST = {torch.float32: 2e-3, torch.bfloat16: 0.06}
"""Of the logits' deviation."""
_STEPS = (((0, 40), (1, 3)), ((0, 1), (1, 30), (2, 5)), ((0, 1), (1, 1), (2, 2)))
"""(sequence, new tokens) of each step."""
_LONGEST = 48


def check_logits(folder: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    models = {name: dict(config) for name, config in FAMILIES.items()}
    if device.type != "cpu":
        models["tinyllama, 4 layers"] = {**TINYLLAMA, "num_hidden_layers": 4}
    for name, config in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            place = folder / f"{name}-{str(dtype).removeprefix('torch.')}".replace(" ", "-")
            artifact = make_artifact(place, config, dtype)
            error = _logits_error(artifact, dtype, device)
            yield {
                "check": "logits",
                "model": name,
                "dtype": str(dtype),
                "error": round(error, 6),
                "allowed": _WORST[dtype],
                "is_right": error <= _WORST[dtype],
            }


def check_texts(folder: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """With products that do not depend on the batch, graphs and steps ahead change no token."""
    artifact = make_artifact(folder / "texts", TINY, torch.bfloat16)
    num, length = (12, 40) if device.type != "cpu" else (2, 3)
    prompts = [[3 + i, 9, 27, 81, 5 * i] * (i + 2) for i in range(num)]
    params = SamplingParams(temperature=0.8, seed=1, top_p=0.9, max_tokens=length, ignore_eos=True)
    expected: Sequence[tuple[int, ...]] | None = None
    for graphs in (False, True):
        for depth in (0, 1):
            runner: dict[str, Any] = {"decode_graphs": graphs, "step_depth": depth}
            runner |= {"executor": "triton", "batch_invariant": True}
            with LLM(artifact, scheduler={"max_num_seqs": 8}, runner=runner) as llm:
                found = [c.token_ids for c in llm.generate(prompts, params)]
            expected = expected or found
            yield {"check": "texts", **runner, "is_right": found == expected}


def _logits_error(artifact: Path, dtype: torch.dtype, device: torch.device) -> float:
    config = ModelConfig.read(artifact)
    spec, weights = build_spec(config), load_weights(artifact, config, dtype, device)
    executors = (
        TorchExecutor(spec, weights, TritonPagedAttention(), TritonOps()),
        TorchExecutor(spec, weights, TorchPagedAttention()),
    )
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(config.vocab_size, (3, _LONGEST), generator=generator).tolist()
    ours, theirs = (_run(each, spec, texts, dtype, device) for each in executors)
    return ((ours - theirs).square().mean().sqrt() / theirs.std()).item()


def _run(
    executor: TorchExecutor,
    spec: DecoderSpec,
    texts: Sequence[list[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Logits of each sequence's last row of each step."""
    blocks = -(-_LONGEST // _BLOCK)
    shape = (len(texts) * blocks, spec.num_kv_heads, _BLOCK, spec.head_dim)
    kv = [
        LayerKV(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        for _ in range(spec.num_layers)
    ]
    done: Mapping[int, int] = dict.fromkeys(range(len(texts)), 0)
    logits = []
    for step in _STEPS:
        chunks = [Chunk(_sequence(seq, done[seq], n, texts, blocks)) for seq, n in step]
        logits.append(executor.forward(build_inputs(chunks, _BLOCK, device), kv).cpu())
        done = {**done, **{seq: done[seq] + n for seq, n in step}}
    return torch.cat(logits)


def _sequence(
    seq: int, start: int, num_tokens: int, texts: Sequence[list[int]], blocks: int
) -> ScheduledSequence:
    """Its blocks lie apart."""
    table = [i * len(texts) + seq for i in range(blocks)]
    return ScheduledSequence(
        seq, start, num_tokens, texts[seq], _LONGEST, [table], SamplingParams(), seed=0
    )
