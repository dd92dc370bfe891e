"""The copy for Ray: its own metric objects take every family that an engine and an ingress have."""

from __future__ import annotations

from deployments.observe.metrics import RayMirror
from torchweave_ray.api.observe.metrics import HttpMetrics
from torchweave_ray.metrics import EngineMetrics, MetricSet, Moves
from torchweave_ray.outputs import RequestOutput, Stats, Timings, Usage


def test_ray_takes_every_metric_once() -> None:
    """Ray's objects check names, tags and boundaries themselves, and raise."""
    engine = EngineMetrics("tiny", 8, lambda: Stats(num_generated_tokens=5, num_running=1))
    engine.note_start({"read": 0.1}, "r1")
    http, moves = HttpMetrics(), Moves()
    sets: list[tuple[MetricSet, dict[str, str]]] = [
        (engine, engine.labels),
        (http, {}),
        (moves, {}),
    ]
    mirrors = [RayMirror(source, labels) for source, labels in sets]
    engine.note_step(0.01, 0.02)
    engine.note_request(RequestOutput("r", (), Usage(4, 5, 0), Timings(0.0, 0.1, 0.2)))
    http.note("/v1/generate", 429, 0.1)
    moves.note("resumed")
    for mirror in mirrors:
        mirror.copy()
        mirror.copy()
    assert engine.take_observed() == []
    names = {each.info["name"] for made in mirrors[0]._made.values() for each in made}
    assert {"torchweave_generated_tokens", "vllm_generation_tokens"} <= names
    assert {"torchweave_step_seconds", "vllm_time_to_first_token_seconds"} <= names
    assert not any(":" in name for name in names), "Ray drops such names"
