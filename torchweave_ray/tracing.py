"""OpenTelemetry spans of requests: off, and nothing imported, unless the environment says where to.

Times are those the engine measured anyway; no content is in a span. Knows no engine and no HTTP.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torchweave_ray.outputs import GenerateRequest, RequestOutput

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

FILE = "TORCHWEAVE_TRACES_FILE"
"""Spans as JSON, one a line."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own; needs the extra `otel`."""
TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")
"""Of the HTTP request that is being answered; a `GenerateRequest` takes it along."""


class Tracing:
    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "torchweave")
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._provider = provider
        self._tracer = provider.get_tracer("torchweave")

    def flush(self) -> None:
        self._provider.force_flush()

    def begin(self, name: str, traceparent: str) -> Span:
        """A server's span, child of the client's when it sent one."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(name, _context(traceparent), kind=SpanKind.SERVER)

    def note_request(self, request: GenerateRequest, output: RequestOutput) -> None:
        """Spans of a request that has just ended: the whole, and queue, prefill and decode."""
        from opentelemetry.trace import set_span_in_context

        timings = output.timings
        if timings is None:
            return
        end = time.time_ns()
        start = end - _ns(timings.total_s)
        scheduled = start + _ns(timings.queue_s)
        first = start + _ns(timings.ttft_s)
        name, context = f"generate {request.model}", _context(request.traceparent)
        span = self._tracer.start_span(name, context, start_time=start)
        span.set_attributes(_attributes(request, output))
        within = set_span_in_context(span)
        parts = [("queue", start, scheduled)]
        if first < end:
            parts += [("prefill", scheduled, first), ("decode", first, end)]
        for part, begins, ends in parts:
            self._tracer.start_span(part, within, start_time=begins).end(ends)
        span.end(end)


def tracing_from_environment() -> Tracing | None:
    """None: off. Raises ImportError when an endpoint is named and the extra is missing."""
    path = os.environ.get(FILE)
    if path:
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        out = open(path, "a", buffering=1)  # noqa: SIM115  # for as long as the process lives
        return Tracing(ConsoleSpanExporter(out=out, formatter=lambda s: s.to_json(None) + "\n"))
    if any(os.environ.get(name) for name in ENDPOINTS):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return Tracing(OTLPSpanExporter())
    return None


def traceparent_of(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _context(traceparent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _attributes(request: GenerateRequest, output: RequestOutput) -> dict[str, Any]:
    usage, timings, sampling = output.usage, output.timings, request.sampling
    assert usage is not None
    assert timings is not None
    reasons = [str(d.finish_reason) for d in output.deltas if d.finish_reason is not None]
    found = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": request.model,
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.n": request.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cached_tokens": usage.cached_tokens,
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.latency.time_in_queue": timings.queue_s,
        "gen_ai.latency.time_to_first_token": timings.ttft_s,
        "gen_ai.latency.e2e": timings.total_s,
    }
    return {name: value for name, value in found.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
