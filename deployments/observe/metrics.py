"""Hands a process's metrics to Ray, whose agents export them as `ray_...`.

Once a second, in a task of its own: no step and no request waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import ray
from prometheus_client.metrics_core import Metric
from ray.util import metrics as ray_metrics

from deployments.backend.attempts import ModelClient
from torchweave_ray.metrics import MetricSet, Moves, alias_of
from torchweave_ray.reported import Reported

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
_UNBOUNDED = float("inf")


def mirrored(source: MetricSet, labels: Mapping[str, str]) -> asyncio.Task[None]:
    """Keep the task: it runs for as long as its process."""
    return asyncio.create_task(RayMirror(source, labels).run())


async def reports_of(clients: Iterable[ModelClient], moves: Moves) -> list[Reported]:
    """Of this ingress and the replicas that answer."""
    answers = await asyncio.gather(*(client.ask_all("metrics") for client in clients))
    return [moves.report(), *(each for each in chain(*answers) if isinstance(each, tuple))]


class RayMirror:
    """Counters by what they grew, gauges as they are, histograms by what was observed."""

    def __init__(self, source: MetricSet, labels: Mapping[str, str]) -> None:
        self._source = source
        self._labels = dict(labels)
        self._made: dict[str, list[Any]] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._source.take_observed()

    async def run(self) -> None:
        """For ever; returns at once where there is no cluster."""
        while ray.is_initialized():
            try:
                self.copy()
            except Exception:
                logger.exception("[Metrics] Ray did not take them")
                return
            await asyncio.sleep(PERIOD_S)

    def copy(self) -> None:
        histograms = set()
        for family in self._source.collect():
            if family.type == "histogram":
                histograms.add(family.name)
                self._of(family)
                continue
            for sample in family.samples:
                tags = {**self._labels, **sample.labels}
                if family.type == "gauge":
                    for gauge in self._of(family):
                        gauge.set(sample.value, tags)
                    continue
                key = (family.name, tuple(sample.labels.values()))
                grown = sample.value - self._counted.get(key, 0.0)
                if grown > 0:
                    self._counted[key] = sample.value
                    for counter in self._of(family):
                        counter.inc(grown, tags)
        for name, value in self._source.take_observed():
            for histogram in self._made[name]:
                histogram.observe(value, self._labels)

    def _of(self, family: Metric) -> list[Any]:
        """Ray's own metrics for a family: under our name, and under vLLM's."""
        made = self._made.get(family.name)
        if made is None:
            names = [family.name, alias_of(family.name)]
            made = [self._make(family, name) for name in names if name is not None]
            self._made[family.name] = made
        return made

    def _make(self, family: Metric, name: str) -> Any:
        keys = {key for sample in family.samples for key in sample.labels if key != "le"}
        tags = (*self._labels, *sorted(keys))
        if family.type == "histogram":
            bounds = {float(s.labels["le"]) for s in family.samples if "le" in s.labels}
            boundaries = sorted(bounds - {_UNBOUNDED})
            return ray_metrics.Histogram(name, family.documentation, boundaries, tags)
        kind = ray_metrics.Gauge if family.type == "gauge" else ray_metrics.Counter
        return kind(name, family.documentation, tags)
