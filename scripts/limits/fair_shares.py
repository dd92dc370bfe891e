"""What one tenant's flood does to another's time to first token, with fair shares and without.

In process, one engine: the guest sends a request at even intervals; beside him nobody, or a flood
that keeps its requests open all the while. All options are of `fair_shares.py --help`.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from torchweave_ray.bench.origin import save_results
from torchweave_ray.build import LoadedModel, build_engine, load_model
from torchweave_ray.cli.artifact import artifact_of
from torchweave_ray.config import EngineConfig
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer

GUEST, FLOOD = "guest", "flood"
SHARE = 0.5
"""Of the machine, for each of two tenants."""
CONFIG = EngineConfig()
CONDITIONS = {"alone": None, "flood of another tenant": FLOOD, "flood of his own": GUEST}


@dataclass(frozen=True, slots=True)
class Load:
    requests: int = 60
    interval_s: float = 1.0
    prompt_len: int = 256
    output_len: int = 16
    flood_clients: int = 64
    flood_prompt_len: int = 256
    flood_output_len: int = 128


@dataclass(frozen=True, slots=True)
class Measured:
    beside: str
    ttft_p50_ms: float
    ttft_p95_ms: float
    flood_tok_s: float
    """Of answers."""


class Source:
    """Requests of random tokens, so that no cache has any of them."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rng = random.Random(7)
        self._number = 0

    def next(self, tenant: str, num_prompt: int, num_output: int) -> GenerateRequest:
        self._number += 1
        prompt = tuple(self._rng.randrange(10, self._vocab_size) for _ in range(num_prompt))
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        return GenerateRequest(f"{self._number}", "", prompt, sampling, tenant=tenant)


def measure(loaded: LoadedModel, tokenizer: Tokenizer, load: Load, beside: str) -> Measured:
    loaded.runner.reset()
    engine = build_engine(loaded, CONFIG, tokenizer)
    source = Source(loaded.info.vocab_size)
    tenant = CONDITIONS[beside]
    flooding: set[str] = set()
    arrivals: dict[str, float] = {}
    ttfts: list[float] = []
    num_sent = num_flood_tokens = 0
    started_at = time.perf_counter()
    first_s = 2.0 if tenant else 0.0  # the flood is there before the guest is
    while len(ttfts) < load.requests:
        now = time.perf_counter() - started_at
        while tenant is not None and len(flooding) < load.flood_clients:
            request = source.next(tenant, load.flood_prompt_len, load.flood_output_len)
            flooding.add(request.request_id)
            engine.add(request)
        due = first_s + num_sent * load.interval_s
        if num_sent < load.requests and now >= due:
            request = source.next(GUEST, load.prompt_len, load.output_len)
            arrivals[request.request_id] = started_at + due
            engine.add(request)
            num_sent += 1
        if not engine.has_work:
            time.sleep(max(0.0, due - (time.perf_counter() - started_at)))
            continue
        for output in engine.step():
            if output.request_id in arrivals:
                at = arrivals.pop(output.request_id)
                ttfts.append(time.perf_counter() - at)
            elif output.request_id in flooding:
                num_flood_tokens += sum(len(delta.token_ids) for delta in output.deltas)
                if output.is_last:
                    flooding.remove(output.request_id)
    percentiles = statistics.quantiles(ttfts, n=20)
    return Measured(
        beside,
        round(statistics.median(ttfts) * 1e3, 1),
        round(percentiles[-1] * 1e3, 1),
        round(num_flood_tokens / (time.perf_counter() - started_at), 1),
    )


def main(
    model: str | None = None,
    requests: Annotated[int, typer.Option(min=2)] = 60,
    save: bool = False,
) -> None:
    artifact = artifact_of(model)
    tokenizer = load_tokenizer(artifact)
    loaded = load_model(artifact, CONFIG)
    load = Load(requests=requests)
    measure(loaded, tokenizer, replace(load, requests=5, interval_s=0.1), "alone")  # to be warm
    points = [asdict(measure(loaded, tokenizer, load, beside)) for beside in CONDITIONS]
    for point in points:
        print(point, flush=True)
    alone, shared, _ = points
    allowed = alone["ttft_p95_ms"] * (1 / SHARE + 0.2)
    print(f"allowed beside another tenant's flood: {allowed:.0f} ms of p95")
    points.append(
        {"allowed_p95_ms": round(allowed, 1), "is_kept": shared["ttft_p95_ms"] <= allowed}
    )
    if save:
        config = {"artifact": artifact.name, **asdict(load)}
        print(save_results("fair-shares", config, points))


if __name__ == "__main__":
    typer.run(main)
