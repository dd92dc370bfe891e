"""What metrics cost: tokens a second with them and without, turn about in one process beside Ray.

python scripts/metrics/cost.py ARTIFACT [--save]

"On" is what a replica does: the meter in every step, and Ray's copy of it once a second. The time
in it is told apart from the throughput that it takes, which other work on the machine blurs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from deployments.observe.metrics import PERIOD_S, RayMirror
from torchweave_ray.bench.origin import save_results
from torchweave_ray.engine.meter import Meter
from torchweave_ray.llm import LLM
from torchweave_ray.outputs import RequestOutput
from torchweave_ray.sampling_params import SamplingParams

ROUNDS = {1: 60, 16: 24}
"""By concurrency; of each kind."""
NUM_PROMPT, NUM_TOKENS = 100, 64
RESULTS = Path("benchmarks/results")


class MirroredMeter:
    """A meter, and Ray's copy as often as a replica makes it. Knows what both took."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._mirror = RayMirror(meter.metrics, meter.metrics.labels)
        self._copied_at = time.monotonic()
        self.seconds = 0.0

    def measure(self, outputs: Sequence[RequestOutput], seconds: float) -> None:
        began = time.perf_counter()
        self._meter.measure(outputs, seconds)
        if time.monotonic() - self._copied_at >= PERIOD_S:
            self._copied_at = time.monotonic()
            self._mirror.copy()
        self.seconds += time.perf_counter() - began


class NoMeter:
    def measure(self, outputs: Sequence[RequestOutput], seconds: float) -> None:
        pass


def measure(llm: Any, number: int, rounds: int) -> dict[str, Any]:
    """Rounds with metrics and without, in turn; the prefix cache meets no prompt twice."""
    on, off = MirroredMeter(llm._meter), NoMeter()
    speeds: dict[str, list[float]] = {"on": [], "off": []}
    busy_s, salt = 0.0, 0
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for turn in range(2 * rounds + 2):
        name, llm._meter = ("on", on) if turn % 4 in (0, 3) else ("off", off)
        prompts = [[100 + (salt + i) % 40_000] * NUM_PROMPT for i in range(number)]
        salt += number
        began = time.perf_counter()
        llm.generate(prompts, params)
        took = time.perf_counter() - began
        if turn < 2:  # the first of each warms up
            on.seconds = 0.0
            continue
        busy_s += took if name == "on" else 0.0
        speeds[name].append(number * NUM_TOKENS / took)
    pairs = zip(speeds["on"], speeds["off"], strict=True)
    lost = sorted(100 * (1 - with_it / without) for with_it, without in pairs)
    return {
        "concurrency": number,
        "tokens_per_s": {name: statistics.median(each) for name, each in speeds.items()},
        "lost_percent": statistics.mean(lost),
        "standard_error": statistics.stdev(lost) / len(lost) ** 0.5,
        "lost_percent_of_each_pair": lost,
        "time_in_metrics_percent": 100 * on.seconds / busy_s,
    }


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False)
    with LLM(Path(sys.argv[1]), max_model_len=512) as llm:
        points = []
        for number, rounds in ROUNDS.items():
            meter = llm._meter
            points.append(measure(llm, number, rounds))
            llm._meter = meter
            print(points[-1])
    if "--save" in sys.argv:
        config = {"rounds": ROUNDS, "prompt_tokens": NUM_PROMPT, "tokens": NUM_TOKENS}
        print(save_results(RESULTS, "metrics-cost", config, points))
    ray.shutdown()


if __name__ == "__main__":
    main()
