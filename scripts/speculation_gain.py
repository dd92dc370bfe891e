"""What speculation gains and costs: the same work with and without it, in turns, texts compared.

Backs the figures of docs/performance.md. It takes as many rounds as fit into its minutes; every
option is in `speculation_gain.py --help`.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

import torchweave_ray.bench.load.prompts as code_of_prompts
import torchweave_ray.engine.budget as code_of_budget
from optimizer.measuring import quality
from torchweave_ray.bench.load.prompts import PromptSource
from torchweave_ray.bench.origin import save_results
from torchweave_ray.build import build_engine, load_model
from torchweave_ray.cli.artifact import artifact_of
from torchweave_ray.config import CacheConfig, EngineConfig, SpeculationConfig
from torchweave_ray.outputs import GenerateRequest, Stats
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer

TEXT = Path(inspect.getfile(quality)).with_name("prose.txt")
KV_BYTES = 256 << 20
SLICE_S = 0.1
STORIES = ("a lighthouse", "two rivers", "the first winter", "an old bicycle", "a lost letter")


@dataclass(frozen=True, slots=True)
class Work:
    name: str
    concurrency: int
    """So many of the prompts at a time, in a closed loop."""
    prompts: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Gain:
    work: str
    concurrency: int
    method: str
    tok_s_without: float
    tok_s_with: float
    ratio: float
    """Median of the races' ratios: tokens a second with it over those without."""
    interval: tuple[float, float]
    """Of the median, 95 %."""
    ratios: list[float]
    tokens_a_step: float
    """Of a sequence: 1 without it."""
    num_drafts: int
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
    crowd = [tuple(tokenizer.encode(str(random_words.next_prompt()))) for _ in range(40)]
    return [
        Work("code editing", 1, edits),
        Work("summarising", 1, summaries),
        Work("open text", 1, stories),
        Work("random words", 1, crowd[:4]),
        Work(
            "open text", 16, [chat(f"Tell me about {s}, {n}.") for s in STORIES for n in "abcdefgh"]
        ),
        Work("random words", 16, crowd),
    ]


class Contender:
    """An engine of its own that lives through all races, as a server's would. It has no prefix
    cache: every race is the same work."""

    def __init__(self, artifact: Path, speculation: SpeculationConfig) -> None:
        cache = CacheConfig(kv_memory=KV_BYTES, enable_prefix_caching=False)
        config = EngineConfig(cache=cache, speculation=speculation)
        self._tokenizer = load_tokenizer(artifact)
        self._engine = build_engine(load_model(artifact, config), config, self._tokenizer)
        self._number = 0
        self.seconds: list[float] = []
        self._waiting: deque[GenerateRequest] = deque()
        self._tokens: dict[str, list[int]] = {}
        self._before = self.stats

    @property
    def stats(self) -> Stats:
        return self._engine.stats()

    def begin(self) -> None:
        """Another kind of work: what was measured before is forgotten."""
        self.seconds, self._before = [], self.stats

    def grown(self, name: str) -> int:
        """A counter, since `begin`."""
        return int(getattr(self.stats, name) - getattr(self._before, name))

    def take(self, prompts: Sequence[tuple[int, ...]], size: int, output_len: int) -> None:
        """So many of these at a time."""
        sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        self._tokens = {}
        for prompt in prompts:
            self._number += 1
            self._tokens[str(self._number)] = []
            self._waiting.append(GenerateRequest(str(self._number), "", prompt, sampling))
        for _ in range(size):
            self._begin_next()
        self.seconds.append(0.0)

    def work(self, seconds: float) -> bool:
        """For so long; False: all is done."""
        started = now = time.perf_counter()
        while self._engine.has_work and now < started + seconds:
            for output in self._engine.step():
                for delta in output.deltas:
                    self._tokens[output.request_id] += delta.token_ids
                if output.is_last:
                    self._begin_next()
            now = time.perf_counter()
        self.seconds[-1] += now - started
        return self._engine.has_work

    def _begin_next(self) -> None:
        if self._waiting:
            self._engine.add(self._waiting.popleft())

    @property
    def texts(self) -> list[list[int]]:
        """Of what it took last."""
        return list(self._tokens.values())


def race(
    contenders: Sequence[Contender],
    prompts: Sequence[tuple[int, ...]],
    size: int,
    output_len: int,
) -> None:
    """All do the same, a slice of time each in turns: a shared machine's pace changes within
    seconds, and so for all of them."""
    for each in contenders:
        each.take(prompts, size, output_len)
    waiting = deque(contenders)
    while waiting:
        each = waiting.popleft()
        if each.work(SLICE_S):
            waiting.append(each)


def measure(
    contenders: dict[str, Contender], work: Work, rounds: int, seconds: float, output_len: int
) -> Iterator[Gain]:
    """Races of one prompt each, or of all in a closed loop; who begins changes, too. One round
    at least is counted."""
    size, differ = work.concurrency, dict.fromkeys(contenders, 0)
    batches = [[prompt] for prompt in work.prompts] if size == 1 else [work.prompts]
    order = list(contenders)
    started, counted = time.perf_counter(), 0
    for number in range(rounds + 1):
        if number == 1:  # the first round is not counted
            for each in contenders.values():
                each.begin()
        for batch in batches:
            race([contenders[name] for name in order], batch, size, output_len)
            order = [*order[1:], order[0]]
            for name, each in contenders.items():
                differ[name] += each.texts != contenders["none"].texts
        counted = number
        if counted and (time.perf_counter() - started) * (number + 2) / (number + 1) > seconds:
            break
    plain = contenders["none"].seconds
    num_tokens = counted * len(work.prompts) * output_len
    for name, each in contenders.items():
        if name == "none":
            continue
        ratios = [a / b for a, b in zip(plain, each.seconds, strict=True)]
        drafts = each.grown("num_draft_tokens")
        yield Gain(
            work=work.name,
            concurrency=size,
            method=name,
            tok_s_without=round(num_tokens / sum(plain), 1),
            tok_s_with=round(num_tokens / sum(each.seconds), 1),
            ratio=round(statistics.median(ratios), 3),
            interval=interval(ratios),
            ratios=[round(ratio, 3) for ratio in ratios],
            tokens_a_step=round(num_tokens / size / each.grown("num_steps"), 2),
            num_drafts=drafts,
            accepted=round(each.grown("num_accepted_tokens") / max(1, drafts), 3),
            texts_differ=differ[name],
        )


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of their median, 95 %: the order statistics that it lies between, whatever they follow."""
    found, num = sorted(ratios), len(ratios)
    below, rank = 0.5**num, 0
    while below <= 0.025 and rank < num // 2:
        rank += 1
        below += math.comb(num, rank) * 0.5**num
    low = max(0, rank - 1)
    return round(found[low], 3), round(found[num - 1 - low], 3)


def main(
    model: str | None = None,
    draft: Annotated[
        str | None, typer.Option(help="A draft model, to measure that method, too.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Only these works.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="At most.")] = 20,
    minutes: Annotated[float, typer.Option(help="In all, from when the models are there.")] = 4.0,
    output_len: Annotated[int, typer.Option(min=1)] = 128,
    save: bool = False,
) -> None:
    artifact = artifact_of(model)
    methods = {
        "none": SpeculationConfig(method="none"),
        "ngram": SpeculationConfig(method="ngram"),
    }
    small = None if draft is None else artifact_of(draft)
    if small is not None:
        methods["draft"] = SpeculationConfig(method="draft", model=str(small))
    contenders = {name: Contender(artifact, method) for name, method in methods.items()}
    gains = []
    wanted = [w for w in works(load_tokenizer(artifact)) if concurrency in (None, w.concurrency)]
    for work in wanted:
        seconds = 60 * minutes / len(wanted)
        for gain in measure(contenders, work, rounds, seconds, output_len):
            gains.append(asdict(gain))
            print(gains[-1], flush=True)
    if save:
        config = {
            "artifact": artifact.name,
            "draft": None if small is None else small.name,
            "rounds": rounds,
            "minutes": minutes,
            "output_len": output_len,
        }
        print(save_results("speculation", config, gains))


if __name__ == "__main__":
    typer.run(main)
