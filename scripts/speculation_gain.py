"""What speculation gains and costs: the same work with and without it, in turns, texts compared.

Backs the figures of docs/performance.md. All options are of `speculation_gain.py --help`.
"""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

import torchweave_ray.bench.load.prompts as code_of_prompts
import torchweave_ray.engine.budget as code_of_budget
from optimizer.measuring import quality
from torchweave_ray.bench.load.prompts import PromptSource
from torchweave_ray.bench.origin import save_results
from torchweave_ray.build import LoadedModel, build_engine, load_model
from torchweave_ray.cli.artifact import artifact_of
from torchweave_ray.config import EngineConfig, SpeculationConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.outputs import GenerateRequest, Stats
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer

TEXT = Path(inspect.getfile(quality)).with_name("prose.txt")
STORIES = ("a lighthouse", "two rivers", "the first winter", "an old bicycle", "a lost letter")


@dataclass(frozen=True, slots=True)
class Work:
    name: str
    concurrency: int
    prompts: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Gain:
    work: str
    concurrency: int
    tok_s_without: float
    tok_s_with: float
    ratio: float
    """Median of the rounds' ratios: with over without."""
    ratios: list[float]
    tokens_a_step: float
    accepted: float
    """Share of the drafts that were right."""
    texts_differ: int


def works(tokenizer: Tokenizer) -> list[Work]:
    def chat(text: str) -> tuple[int, ...]:
        shown = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return tuple(tokenizer.encode(shown))

    code = [
        inspect.getsource(part)
        for part in (
            code_of_prompts.PromptSource,
            code_of_budget.StepBudget.chunk,
            code_of_budget.work_ms,
            code_of_budget.prompt_tokens_per_s,
        )
    ]
    pages = [p for p in TEXT.read_text().split("\n\n") if len(p) > 400][:4]
    edits = [chat(f"Write this code again, with a comment at the top.\n\n{c[:1500]}") for c in code]
    summaries = [chat(f"{page}\n\nSummarise the text above in its own words.") for page in pages]
    stories = [chat(f"Tell me a story about {what}.") for what in STORIES]
    random_words = PromptSource(100, 11)
    crowd = [tuple(tokenizer.encode(str(random_words.next_prompt()))) for _ in range(32)]
    return [
        Work("code editing", 1, edits),
        Work("summarising", 1, summaries),
        Work("open text", 1, stories),
        Work("random words", 1, crowd[:4]),
        Work(
            "open text", 16, [chat(f"{i}. Tell me about {s}.") for i in range(7) for s in STORIES]
        ),
        Work("random words", 16, crowd),
    ]


def run(engine: Engine, work: Work, output_len: int) -> tuple[list[tuple[int, ...]], float]:
    """The tokens of each prompt, and the seconds they took."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(work.prompts))}
    waiting = [
        GenerateRequest(str(i), "", prompt, sampling) for i, prompt in enumerate(work.prompts)
    ][::-1]
    num_running = 0
    started = time.perf_counter()
    while waiting or num_running:
        while waiting and num_running < work.concurrency:
            engine.add(waiting.pop())
            num_running += 1
        for output in engine.step():
            for delta in output.deltas:
                tokens[output.request_id] += delta.token_ids
            num_running -= output.is_last
    return [tuple(ids) for ids in tokens.values()], time.perf_counter() - started


def measure(
    loaded: LoadedModel, tokenizer: Tokenizer, work: Work, rounds: int, output_len: int
) -> Gain:
    config = EngineConfig(speculation=SpeculationConfig(method="ngram"))
    without = replace(config, speculation=SpeculationConfig(method="none"))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    texts: dict[bool, list[tuple[int, ...]]] = {}
    stats: dict[bool, Stats] = {}
    for number in range(rounds + 1):  # the first is not counted
        for speculates in (number % 2 == 0, number % 2 == 1):
            loaded.runner.reset()
            engine = build_engine(loaded, config if speculates else without, tokenizer)
            texts[speculates], took = run(engine, work, output_len)
            stats[speculates] = engine.stats()
            seconds[speculates].append(took)
    num_tokens = sum(map(len, texts[True]))
    ratios = [b / a for a, b in zip(seconds[True][1:], seconds[False][1:], strict=True)]
    drafts = stats[True].num_draft_tokens
    return Gain(
        work.name,
        work.concurrency,
        round(num_tokens / statistics.median(seconds[False][1:]), 1),
        round(num_tokens / statistics.median(seconds[True][1:]), 1),
        round(statistics.median(ratios), 3),
        [round(ratio, 3) for ratio in ratios],
        round(num_tokens / max(1, stats[True].num_steps), 2),
        round(stats[True].num_accepted_tokens / max(1, drafts), 3),
        sum(a != b for a, b in zip(texts[True], texts[False], strict=True)),
    )


def main(
    model: str | None = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    output_len: Annotated[int, typer.Option(min=1)] = 128,
    save: bool = False,
) -> None:
    artifact = artifact_of(model)
    tokenizer = load_tokenizer(artifact)
    loaded = load_model(artifact, EngineConfig())
    gains = []
    for work in works(tokenizer):
        gains.append(asdict(measure(loaded, tokenizer, work, rounds, output_len)))
        print(gains[-1], flush=True)
    if save:
        config = {"artifact": artifact.name, "rounds": rounds, "output_len": output_len}
        print(save_results(Path("benchmarks/results"), "speculation", config, gains))


if __name__ == "__main__":
    typer.run(main)
