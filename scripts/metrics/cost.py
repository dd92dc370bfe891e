"""What metrics cost: steps with them and steps without, turn about in one process beside Ray.

python scripts/metrics/cost.py ARTIFACT [--save]

"On" is what a replica does: the meter in every step, and Ray's copy of it once a second. Steps take
turns in slices so short that whatever else the machine does meets both kinds; the faster half of
each kind is compared, for others only ever slow a step down. Ray's copy is timed by itself.
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

ROUNDS = {1: 50, 16: 25}
"""By concurrency."""
SLICE = 4
"""Steps."""
NUM_PROMPT, NUM_TOKENS = 100, 64
Steps = dict[bool, list[float]]


class AlternatingMeter:
    """A meter for some steps and none for the next ones, and Ray's copy as often as a replica makes
    it. Knows how long the steps of each kind took, from one's end to the next one's."""

    def __init__(self, meter: Meter, number: int) -> None:
        self._meter = meter
        self._number = number
        self._mirror = RayMirror(meter.metrics, meter.metrics.labels)
        self._copied_at = time.monotonic()
        self._num_steps = 0
        self._ended_at = 0.0
        self.steps: Steps = {True: [], False: []}
        self.copies_s: list[float] = []

    def measure(self, outputs: Sequence[RequestOutput], seconds: float) -> None:
        is_on = self._num_steps // SLICE % 2 == 0
        ends = any(output.is_last for output in outputs)
        if is_on or ends:
            self._meter.measure(outputs, seconds)
        now = time.perf_counter()
        # Of the same kind throughout, with every sequence in it, and none that ends.
        if len(outputs) == self._number and self._num_steps % SLICE and not ends:
            self.steps[is_on].append(now - self._ended_at)
        if time.monotonic() - self._copied_at >= PERIOD_S:
            self._copied_at = time.monotonic()
            self._mirror.copy()
            self.copies_s.append(time.perf_counter() - now)
        self._num_steps += 1
        self._ended_at = time.perf_counter()


def measure(llm: Any, number: int, rounds: int) -> dict[str, Any]:
    plain = llm._meter
    llm._meter = meter = AlternatingMeter(plain, number)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for turn in range(rounds):
        first = 100 + turn * number
        prompts = [[first + i] * NUM_PROMPT for i in range(number)]
        llm.generate(prompts, params)
    llm._meter = plain
    with_it, without = faster_half(meter.steps[True]), faster_half(meter.steps[False])
    on, off = statistics.mean(with_it), statistics.mean(without)
    error = (_error(with_it) ** 2 + _error(without) ** 2) ** 0.5
    copies = 100 * statistics.median(meter.copies_s) / PERIOD_S
    return {
        "concurrency": number,
        "steps": {"on": len(meter.steps[True]), "off": len(meter.steps[False])},
        "step_ms": {"on": 1e3 * on, "off": 1e3 * off},
        "steps_percent": 100 * (on - off) / on,
        "standard_error": 100 * error / on,
        "copies_percent": copies,
        "lost_percent": 100 * (on - off) / on + copies,
    }


def faster_half(steps: Sequence[float]) -> list[float]:
    return sorted(steps)[: len(steps) // 2]


def _error(values: Sequence[float]) -> float:
    return float(statistics.stdev(values) / len(values) ** 0.5)


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False)
    with LLM(Path(sys.argv[1]), max_model_len=512) as llm:
        measure(llm, 1, 4)  # warms up
        points = []
        for number, rounds in ROUNDS.items():
            points.append(measure(llm, number, rounds))
            print(points[-1])
    if "--save" in sys.argv:
        config = {"rounds": ROUNDS, "slice": SLICE, "prompt": NUM_PROMPT, "tokens": NUM_TOKENS}
        print(save_results("metrics-cost", config, points))
    ray.shutdown()


if __name__ == "__main__":
    main()
