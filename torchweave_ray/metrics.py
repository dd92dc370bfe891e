"""What a server counts and times: names, buckets, and the Prometheus text of many processes.

Histograms are observed per step or per request, never per token; what `Stats` counts is read only
when somebody asks. Knows no engine, no HTTP and no Ray: deployments/metrics.py hands it on there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from torchweave_ray.deadline import Late
from torchweave_ray.outputs import FinishReason, RequestOutput, Stats, Timings, Usage
from torchweave_ray.reported import Reported

PREFIX = "torchweave_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (*(0.001 * 2**i for i in range(19)),)
"""1 ms to 262 s, each twice the one before."""
TOKENS = (*(2.0**i for i in range(18)),)

ALIASES = {
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "request_seconds": "e2e_request_latency_seconds",
    "queue_seconds": "request_queue_time_seconds",
    "prefill_seconds": "request_prefill_time_seconds",
    "decode_seconds": "request_decode_time_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generated_tokens": "request_generation_tokens",
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "kv_usage_ratio": "kv_cache_usage_perc",
    "prompt_tokens": "prompt_tokens",
    "generated_tokens": "generation_tokens",
    "preemptions": "num_preemptions",
    "prefix_query_tokens": "prefix_cache_queries",
    "prefix_hit_tokens": "prefix_cache_hits",
    "requests": "request_success",
    "draft_tokens": "spec_decode_num_draft_tokens",
    "accepted_draft_tokens": "spec_decode_num_accepted_tokens",
}
"""Our name to vLLM's, both without prefix; vLLM's comes as `vllm_...`, as Ray's own board reads."""

_COUNTED = {
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens of requests taken"),
    "generated_tokens": ("num_generated_tokens", "Tokens generated"),
    "computed_tokens": ("num_computed_tokens", "Tokens that steps computed"),
    "prefix_query_tokens": ("num_prefix_query_tokens", "Prompt tokens looked up in the cache"),
    "prefix_hit_tokens": ("num_prefix_hit_tokens", "Prompt tokens that the prefix cache had"),
    "preemptions": ("num_preemptions", "Sequences put back to the queue for want of memory"),
    "steps": ("num_steps", "Engine steps"),
    "spill_restored_tokens": ("num_restored_tokens", "Cached tokens read back from the disk"),
    "spill_saved_blocks": ("num_saved_blocks", "Cached blocks written to the disk"),
    "spill_damaged_blocks": ("num_damaged_blocks", "Blocks on the disk that were not whole"),
    "wakes": ("num_wakes", "Times that a sleeping engine was woken"),
}
"""Counter: (field of `Stats`, meaning)."""
_DRAFTED = {
    "draft_tokens": ("num_draft_tokens", "Tokens that speculation guessed"),
    "accepted_draft_tokens": ("num_accepted_tokens", "Of them, those that were right"),
}
"""The same, by method."""
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Arrival at the engine to first token", SECONDS),
    "time_per_output_token_seconds": ("Mean time of a request's tokens after the first", SECONDS),
    "inter_token_latency_seconds": ("Gap between tokens, the mean of a step's streams", SECONDS),
    "request_seconds": ("Arrival at the engine to the end", SECONDS),
    "queue_seconds": ("Arrival at the engine to the first step", SECONDS),
    "prefill_seconds": ("First step to first token", SECONDS),
    "decode_seconds": ("First token to the end", SECONDS),
    "step_seconds": ("One engine step", SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a request", TOKENS),
    "request_generated_tokens": ("Generated tokens of a request", TOKENS),
}


class MetricSet:
    """One process's metrics of one kind, and what was observed since somebody last took it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._histograms: dict[str, Histogram] = {}
        self._observed: list[tuple[str, float]] | None = None

    def histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> None:
        self._histograms[name] = Histogram(
            PREFIX + name, meaning, buckets=buckets, registry=self.registry
        )

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, meaning, labels, registry=self.registry)

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)
        if self._observed is not None:
            self._observed.append((PREFIX + name, value))

    def take_observed(self) -> list[tuple[str, float]]:
        """Since the last call; they are kept from the first call on. Any thread may call."""
        observed, self._observed = self._observed, []
        return observed or []

    def collect(self) -> list[Metric]:
        families = list(self.registry.collect())
        for family in families:
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
        return families


class EngineMetrics(MetricSet):
    """Of one engine. `snapshot` may be called from any thread."""

    def __init__(
        self,
        model: str,
        max_num_seqs: int,
        snapshot: Callable[[], Stats],
        speculation: str = "none",
    ) -> None:
        """`speculation`: its method."""
        super().__init__()
        self._speculation = {"method": speculation}
        self.labels = {"model_name": model}
        self._max_num_seqs = max_num_seqs
        self._snapshot = snapshot
        self._startup_s: dict[str, float] = {}
        self._place: dict[str, str] = {}
        for name, (meaning, buckets) in _HISTOGRAMS.items():
            self.histogram(name, meaning, buckets)
        self._requests = self.counter("requests", "Requests ended, by reason", "finished_reason")
        self._refused = self.counter("admission_rejections", "Requests refused", "reason")
        for reason in FinishReason:
            self._requests.labels(reason)  # a rate needs the 0 that it grew from
        self._refused.labels("queue_full")
        self.registry.register(_Asked(self._of_stats))

    def report(self) -> Reported:
        return {**self.labels, **self._place}, self.collect()

    def note_start(self, seconds: Mapping[str, float], replica: str) -> None:
        self._startup_s = dict(seconds)
        self._place = {"replica": replica} if replica else {}

    def note_step(self, seconds: float, gap_s: float | None) -> None:
        """`gap_s`: mean time since the step's streams had their last token."""
        self.observe("step_seconds", seconds)
        if gap_s is not None:
            self.observe("inter_token_latency_seconds", gap_s)

    def note_refusal(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def note_request(self, output: RequestOutput) -> None:
        """The last output of a request."""
        assert output.usage is not None
        self._requests.labels(reason_of(output)).inc()
        if output.timings is not None:
            self._note_times(output.timings, output.usage)

    def _note_times(self, timings: Timings, usage: Usage) -> None:
        self.observe("request_seconds", timings.total_s)
        self.observe("queue_seconds", timings.queue_s)
        self.observe("request_prompt_tokens", usage.prompt_tokens)
        self.observe("request_generated_tokens", usage.completion_tokens)
        if not usage.completion_tokens:
            return
        decode_s = timings.total_s - timings.ttft_s
        self.observe("time_to_first_token_seconds", timings.ttft_s)
        self.observe("prefill_seconds", timings.ttft_s - timings.queue_s)
        self.observe("decode_seconds", decode_s)
        if usage.completion_tokens > 1:
            self.observe("time_per_output_token_seconds", decode_s / (usage.completion_tokens - 1))

    def _of_stats(self) -> Iterable[Metric]:
        stats = self._snapshot()
        for name, (field, meaning) in _COUNTED.items():
            yield CounterMetricFamily(PREFIX + name, meaning, value=getattr(stats, field))
        for name, (field, meaning) in _DRAFTED.items():
            drafted = CounterMetricFamily(PREFIX + name, meaning, labels=[*self._speculation])
            drafted.add_metric([*self._speculation.values()], getattr(stats, field))
            yield drafted
        for name, meaning, value in (
            ("requests_running", "Sequences in the batch", stats.num_running),
            ("requests_waiting", "Sequences in the queue", stats.num_waiting),
            ("waiting_tokens", "Prompt tokens still to compute", stats.num_waiting_tokens),
            ("kv_usage_ratio", "Share of KV blocks that sequences hold", stats.kv_usage),
            ("kv_blocks", "KV blocks there are", stats.num_blocks),
            ("asleep", "1 while the engine sleeps", stats.num_asleep),
            ("batch_utilization_ratio", "Of the limit", stats.num_running / self._max_num_seqs),
        ):
            yield GaugeMetricFamily(PREFIX + name, meaning, value=value)
        startup = GaugeMetricFamily(
            PREFIX + "startup_seconds", "Stages of this replica's start", labels=["stage"]
        )
        for stage, seconds in self._startup_s.items():
            startup.add_metric([stage], seconds)
        yield startup


class Moves(MetricSet):
    """What a backend of several replicas did with requests that one of them did not finish."""

    def __init__(self) -> None:
        super().__init__()
        meaning = "Requests that left a replica: retried for want of room, resumed after a loss"
        self._moves = self.counter("request_moves", meaning, "kind")
        for kind in ("retried", "resumed"):
            self._moves.labels(kind)

    def note(self, kind: str) -> None:
        self._moves.labels(kind).inc()

    def report(self) -> Reported:
        return {}, self.collect()


class _Asked(Collector):
    """Families that are made when they are asked for."""

    def __init__(self, make: Callable[[], Iterable[Metric]]) -> None:
        self._make = make

    def collect(self) -> Iterable[Metric]:
        return self._make()


def reason_of(output: RequestOutput) -> str:
    """Why a request ended; of several choices the worst, of a missed deadline "deadline"."""
    errors = {delta.error for delta in output.deltas if delta.error is not None}
    if errors:
        return "deadline" if errors <= set(Late) else FinishReason.ERROR
    reasons = [delta.finish_reason for delta in output.deltas if delta.finish_reason]
    return reasons[-1] if reasons else FinishReason.STOP


def exposition(reports: Iterable[Reported]) -> bytes:
    """The Prometheus text of all, each series with its process's labels, and vLLM's names."""
    merged: dict[str, Metric] = {}
    for labels, families in reports:
        for family in families:
            into = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            into.samples += [s._replace(labels={**labels, **s.labels}) for s in family.samples]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Asked(lambda: [*merged.values(), *_aliased(merged)]))
    return generate_latest(registry)


def alias_of(name: str) -> str | None:
    """vLLM's name of one of our families, prefixes included."""
    alias = ALIASES.get(name.removeprefix(PREFIX))
    return None if alias is None else f"vllm_{alias}"


def _aliased(families: Mapping[str, Metric]) -> Iterable[Metric]:
    for name, family in families.items():
        alias = alias_of(name)
        if alias is not None:
            copy = Metric(alias, family.documentation, family.type)
            copy.samples = [_renamed(sample, name, alias) for sample in family.samples]
            yield copy


def _renamed(sample: Sample, old: str, new: str) -> Sample:
    return sample._replace(name=new + sample.name.removeprefix(old))
