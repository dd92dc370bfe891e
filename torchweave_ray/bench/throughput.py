"""The closed loop inside one process: the engine's speed, with no HTTP and no Ray.

The work and the points are those of `bench.load.serving`, so the two compare line by line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchweave_ray.bench.load.prompts import PromptSource
from torchweave_ray.bench.report.points import Point, RequestRecord, summarize
from torchweave_ray.build import LoadedModel, build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.outputs import GenerateRequest, RequestOutput
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class ThroughputConfig:
    """Work W1 of docs/performance.md unless said otherwise; fields as in ServingConfig."""

    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    requests: int | None = None
    input_len: int = 100
    output_len: int = 128
    seed: int = 0

    def num_requests(self, concurrency: int) -> int:
        return self.requests if self.requests is not None else max(8, 3 * concurrency)


@dataclass(slots=True)
class _Running:
    sent_at: float
    text_times: list[float]


def run_throughput(
    artifact: Path,
    engine_config: EngineConfig,
    config: ThroughputConfig,
    report: Callable[[Point], None],
) -> tuple[LoadedModel, list[Point]]:
    """Load the artifact and measure it at every concurrency."""
    tokenizer = load_tokenizer(artifact)
    loaded = load_model(artifact, engine_config)
    engine = build_engine(loaded, engine_config, tokenizer)
    points = []
    for index, concurrency in enumerate(config.concurrency):
        prompts = PromptSource(config.input_len, config.seed + 7919 * index)
        warmup = _requests(
            f"warm-{index}", concurrency, min(8, config.output_len), prompts, tokenizer
        )
        _closed_loop(engine, warmup, concurrency)
        work = _requests(
            f"work-{index}", config.num_requests(concurrency), config.output_len, prompts, tokenizer
        )
        cpu, started = time.process_time(), time.perf_counter()
        records = _closed_loop(engine, work, concurrency)
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        points.append(summarize("engine", concurrency, records, wall_s, server_cpu_s=cpu_s))
        report(points[-1])
    engine.close()
    return loaded, points


def _requests(
    name: str, num: int, output_len: int, prompts: PromptSource, tokenizer: Tokenizer
) -> list[GenerateRequest]:
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    requests = []
    for i in range(num):
        prompt = prompts.next_prompt()
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        requests.append(GenerateRequest(f"{name}-{i}", "", tuple(token_ids), sampling))
    return requests


def _closed_loop(
    engine: Engine, requests: list[GenerateRequest], concurrency: int
) -> list[RequestRecord]:
    """Keep `concurrency` requests in the engine until all have been answered."""
    waiting: Iterator[GenerateRequest] = iter(requests)
    running: dict[str, _Running] = {}
    records: list[RequestRecord] = []

    def add_next() -> None:
        if (request := next(waiting, None)) is not None:
            running[request.request_id] = _Running(time.perf_counter(), [])
            engine.add(request)

    for _ in range(concurrency):
        add_next()
    while running:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if any(delta.text for delta in output.deltas):
                running[output.request_id].text_times.append(now)
            if output.is_last:
                records.append(_record(running.pop(output.request_id), output, now))
                add_next()
    return records


def _record(run: _Running, output: RequestOutput, now: float) -> RequestRecord:
    assert output.usage is not None
    errors = [delta.error for delta in output.deltas if delta.error is not None]
    return RequestRecord(
        run.sent_at,
        now,
        tuple(run.text_times),
        output.usage.prompt_tokens,
        output.usage.completion_tokens,
        output.usage.cached_tokens,
        errors[0] if errors else None,
    )
