"""Greedy texts of the native executor beside the torch backend's: 200 prompts, every difference.

python scripts/compare_greedy.py [--model smollm2-135m] [--prompts 200] [--tokens 24] [--save]

At the first token that differs, the torch backend's bf16 logits of the two tokens say whether it
was a near-tie: their gap is at most two steps of bf16 (8 significant bits) at the larger one's
size. A logit is a sum of rounded terms, rounded once more: it is off by half a step by the last
rounding alone, by about one with those before, so two that are two steps apart can change places.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from optimizer.measuring import quality
from optimizer.measuring.model import make_inputs
from torchweave_ray.attention.base import LayerKV
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.bench.load.prompts import PromptSource
from torchweave_ray.bench.origin import RESULTS, describe_machine, save_results
from torchweave_ray.cli.artifact import artifact_of
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement, open_executor
from torchweave_ray.models.registry import build_spec
from torchweave_ray.sampling_params import SamplingParams

NEAR_TIE_STEPS = 2.0
PROSE = Path(quality.__file__).with_name("prose.txt")
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token at which the two answers to a prompt part."""

    prompt: int
    index: int
    """Of the generated token."""
    native: int
    torch: int
    """Token ids."""
    gap: float
    """The torch backend's bf16 logit of its token less that of the native one's."""
    gap_in_steps: float
    """In steps of bf16 at the larger of the two."""
    gap_fp32: float
    """The same gap with all arithmetic in fp32; negative: fp32 agrees with the native token."""
    gap_fp32_in_steps: float
    near_tie: bool


def make_prompts(num: int, seed: int = 0) -> list[str]:
    """Half are pieces of the bundled prose, 16 to 47 words from distinct places; half random."""
    words = PROSE.read_text().split()
    num_prose = num // 2
    lengths = [16 + i % 32 for i in range(num_prose)]
    starts = [i * (len(words) - 48) // max(1, num_prose) for i in range(num_prose)]
    prompts = [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=True)]
    for i in range(num - num_prose):
        prompt = PromptSource(16 + i % 48, seed + i).next_prompt()
        assert isinstance(prompt, str)
        prompts.append(prompt)
    return prompts


def generate(
    artifact: Path, executor: Literal["native", "torch"], prompts: Sequence[str], num_tokens: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Token ids of the prompts and of the answers."""
    options: dict[str, Any] = {
        "max_model_len": 512,
        "cache": {"kv_memory": 256 << 20},
        "runner": {"executor": executor},
    }
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    with LLM(artifact, **options) as llm:
        print(f"{llm.info.executor} {llm.info.dtype}", file=sys.stderr, flush=True)
        completions = llm.generate(list(prompts), params)
    return [c.prompt_token_ids for c in completions], [c.token_ids for c in completions]


class TorchLogits:
    """The torch executor over one artifact, asked for the logits after a text."""

    def __init__(self, artifact: Path, dtype: torch.dtype) -> None:
        manifest = verify_artifact(artifact)
        config = ModelConfig.read(artifact)
        placement = Placement(dtype, torch.device("cpu"), describe_machine().cores, "torch")
        self._dtype = dtype
        self._spec = build_spec(config)
        self._executor = open_executor(artifact, config, manifest, placement, TorchPagedAttention())

    def after(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[vocab_size] float32."""
        spec, num = self._spec, len(token_ids)
        shape = (-(-num // BLOCK), spec.num_kv_heads, BLOCK, spec.head_dim)
        cache = [
            LayerKV(torch.zeros(shape, dtype=self._dtype), torch.zeros(shape, dtype=self._dtype))
            for _ in range(spec.num_layers)
        ]
        inputs = make_inputs([(0, num)], torch.tensor(token_ids), num)
        return self._executor.forward(inputs, cache)[0]


def step_of_bf16(value: float) -> float:
    """Distance of neighbouring bf16 numbers of this size."""
    return 0.0 if value == 0.0 else math.ldexp(1.0, math.frexp(abs(value))[1] - 8)


def judge(bf16: torch.Tensor, fp32: torch.Tensor, native: int, reference: int) -> dict[str, Any]:
    """Of the two tokens' logits after the text before them."""
    ours, theirs = bf16[native].item(), bf16[reference].item()
    step = step_of_bf16(max(abs(ours), abs(theirs)))
    steps = (theirs - ours) / step if step else 0.0
    gap_fp32 = (fp32[reference] - fp32[native]).item()
    return {
        "gap": theirs - ours,
        "gap_in_steps": steps,
        "gap_fp32": gap_fp32,
        "gap_fp32_in_steps": gap_fp32 / step if step else 0.0,
        "near_tie": abs(steps) <= NEAR_TIE_STEPS,
    }


def summary(num_prompts: int, differences: Sequence[Difference]) -> dict[str, int]:
    return {
        "prompts": num_prompts,
        "equal": num_prompts - len(differences),
        "near_ties": sum(d.near_tie for d in differences),
        "not_near_ties": sum(not d.near_tie for d in differences),
        # What fp32 says of all that differ: how many it finds as close, and whom it sides with.
        "near_ties_in_fp32": sum(abs(d.gap_fp32_in_steps) <= NEAR_TIE_STEPS for d in differences),
        "fp32_sides_with_native": sum(d.gap_fp32 < 0 for d in differences),
    }


def compare(artifact: Path, prompts: Sequence[str], num_tokens: int) -> list[Difference]:
    prompt_ids, expected = generate(artifact, "torch", prompts, num_tokens)
    _, actual = generate(artifact, "native", prompts, num_tokens)
    parted = [i for i in range(len(prompts)) if actual[i] != expected[i]]
    if not parted:
        return []
    torch.set_num_threads(describe_machine().cores)  # the native executor leaves torch one
    models = [TorchLogits(artifact, dtype) for dtype in (torch.bfloat16, torch.float32)]
    differences = []
    for i in parted:
        pairs = zip(actual[i], expected[i], strict=True)
        at = next(k for k, (ours, theirs) in enumerate(pairs) if ours != theirs)
        text = [*prompt_ids[i], *expected[i][:at]]
        bf16, fp32 = (model.after(text) for model in models)
        found = judge(bf16, fp32, actual[i][at], expected[i][at])
        differences.append(Difference(i, at, actual[i][at], expected[i][at], **found))
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="an artifact's folder or a recipe; default: SmolLM2-135M")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of an answer")
    parser.add_argument("--save", action="store_true", help="write a results file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    artifact = artifact_of(arguments.model)
    differences = compare(artifact, make_prompts(arguments.prompts), arguments.tokens)
    lines = [asdict(difference) for difference in differences]
    counts = summary(arguments.prompts, differences)
    for line in (*lines, counts):
        print(json.dumps(line))
    if arguments.save:
        config = {"model": artifact.name, "tokens": arguments.tokens, "steps": NEAR_TIE_STEPS}
        path = save_results("greedy", config, [counts, *lines], arguments.results)
        print(f"saved {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
