"""Do a request's tokens depend on who else is in its batch? The log probabilities of seeded streams
that run alone and in a crowd, on the native executor and on torch in fp32.

python scripts/batch_invariance.py [--model smollm2-135m] [--streams 24] [--tokens 48] [--save]
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchweave_ray.bench.origin import save_results
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.cli.artifact import artifact_of
from torchweave_ray.config import EngineConfig
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer

KV_BYTES = 256 << 20
EXECUTORS = {"native": "auto", "torch": "float32"}
"""And the type that each computes in."""

Scores = dict[str, list[tuple[int, float]]]
"""(token, its log probability), by request."""


def requests(model: str, vocab_size: int, streams: int, tokens: int) -> list[GenerateRequest]:
    dice = random.Random(7)
    return [
        GenerateRequest(
            str(i),
            model,
            tuple(dice.randrange(100, vocab_size) for _ in range(dice.randint(3, 100))),
            SamplingParams(max_tokens=tokens, ignore_eos=True, seed=i, temperature=1.0, logprobs=1),
        )
        for i in range(streams)
    ]


def run(artifact: Path, executor: str, at_once: int, streams: int, tokens: int) -> Scores:
    config = EngineConfig()
    config = replace(
        config,
        cache=replace(config.cache, kv_memory=KV_BYTES),
        runner=replace(config.runner, executor=executor, dtype=EXECUTORS[executor]),
        scheduler=replace(config.scheduler, max_num_seqs=at_once),
    )
    loaded = load_model(artifact, config)
    engine = build_engine(loaded, config, load_tokenizer(loaded.tokenizer_dir))
    for request in requests(loaded.info.id, loaded.info.vocab_size, streams, tokens):
        engine.add(request)
    scores: Scores = {}
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                scored = [(each.token_id, each.logprob) for each in delta.logprobs or ()]
                scores.setdefault(output.request_id, []).extend(scored)
    engine.close()
    return scores


def compare(alone: Scores, crowd: Scores) -> dict[str, Any]:
    """Of each stream the tokens up to where its texts part, if they do."""
    gaps, texts = [], 0
    for key, scores in alone.items():
        for (a, first), (b, second) in zip(scores, crowd[key], strict=True):
            if a != b:
                texts += 1
                break
            gaps.append(abs(first - second))
    return {
        "streams": len(alone),
        "tokens": len(gaps),
        "tokens_with_another_logprob": sum(gap > 0 for gap in gaps),
        "mean_gap": sum(gaps) / len(gaps),
        "max_gap": max(gaps),
        "other_texts": texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--save", action="store_true", help="write a results file")
    options = parser.parse_args()
    artifact = artifact_of(options.model)
    points = []
    for executor in EXECUTORS:
        alone, crowd = (
            run(artifact, executor, at_once, options.streams, options.tokens)
            for at_once in (1, options.streams)
        )
        points.append({"executor": executor, **compare(alone, crowd)})
        print(json.dumps(points[-1]), flush=True)
    if options.save:
        print(save_results("invariance", vars(options), points))


if __name__ == "__main__":
    main()
