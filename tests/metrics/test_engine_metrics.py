"""What an engine reports of a real run, and what it says of itself when it dies."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.test_async_engine import LIMITS, FailingRunner, SlowRunner, running, until
from tests.engine.test_scheduler import make_request
from tests.tiny import make_tiny_artifact
from torchweave_ray.errors import EngineDead, Overloaded
from torchweave_ray.llm import LLM
from torchweave_ray.metrics import EngineMetrics, exposition
from torchweave_ray.outputs import Stats
from torchweave_ray.sampling_params import SamplingParams

Samples = dict[tuple[str, str], float]


def samples_of(text: str, *labels: str) -> Samples:
    """By sample name and the values of `labels`."""
    return {
        (sample.name, ",".join(sample.labels.get(label, "") for label in labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_a_run_without_a_server_counts_what_it_did(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny")
    with LLM(artifact, max_model_len=128, runner={"threads": 1}) as llm:
        prompts = [[5 + i] * 20 for i in range(3)]
        llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        found = samples_of(llm.metrics(), "finished_reason")
        steps = llm.stats().num_steps
        assert 'model_name="tiny"' in llm.metrics()
    assert found["torchweave_requests_total", "length"] == 3
    assert found["torchweave_requests_total", "abort"] == 0
    assert found["torchweave_prompt_tokens_total", ""] == 60
    assert found["torchweave_generated_tokens_total", ""] == 24
    assert found["torchweave_request_generated_tokens_sum", ""] == 24
    assert (
        found["torchweave_steps_total", ""] == found["torchweave_step_seconds_count", ""] == steps
    )
    assert 0 < found["torchweave_inter_token_latency_seconds_count", ""] < steps
    parts = [f"torchweave_{part}_seconds_sum" for part in ("queue", "prefill", "decode")]
    whole = found["torchweave_request_seconds_sum", ""]
    assert sum(found[part, ""] for part in parts) == pytest.approx(whole)
    # vLLM's names say the same.
    assert found["vllm_request_success_total", "length"] == 3
    assert found["vllm_generation_tokens_total", ""] == 24
    assert found["vllm_e2e_request_latency_seconds_sum", ""] == whole


def test_refusals_and_aborts_are_counted() -> None:
    async def run() -> None:
        runner = SlowRunner(LIMITS)
        async with running(runner, max_waiting_tokens=200, max_num_seqs=1) as engine:
            first = engine.generate(make_request("first", 150, max_tokens=7000))
            await anext(first)
            second = asyncio.ensure_future(anext(engine.generate(make_request("second", 150))))
            await until(lambda: engine.snapshot().num_waiting_tokens == 150)
            with pytest.raises(Overloaded):
                await anext(engine.generate(make_request("third", 150)))
            await first.aclose()
            await second
            await until(lambda: engine.snapshot().num_finished >= 1)
            await asyncio.sleep(0.05)  # outputs are delivered before they are counted
            text = exposition(await engine.metrics()).decode()
        found = samples_of(text, "reason", "finished_reason")
        assert found["torchweave_admission_rejections_total", "queue_full,"] == 1
        assert found["torchweave_requests_total", ",abort"] == 1

    asyncio.run(run())


def test_processes_keep_their_own_series() -> None:
    sets = []
    for replica in ("r1", "r2"):
        metrics = EngineMetrics("m", 8, lambda: Stats(num_generated_tokens=7, num_running=4))
        metrics.note_start({"read": 0.5}, replica)
        sets.append(metrics)
    sets[0].note_step(0.01, 0.02)
    text = exposition(each.report() for each in sets).decode()
    found = samples_of(text, "replica")
    assert found["torchweave_generated_tokens_total", "r1"] == 7
    assert found["torchweave_batch_utilization_ratio", "r2"] == 0.5
    assert found["torchweave_step_seconds_count", "r1"] == 1
    assert found["torchweave_step_seconds_count", "r2"] == 0
    assert text.count("# TYPE torchweave_steps_total counter") == 1
    assert text.count("torchweave_startup_seconds{") == 2


def test_guesses_are_counted_by_method() -> None:
    stats = Stats(num_draft_tokens=9, num_accepted_tokens=7)
    text = exposition([EngineMetrics("m", 8, lambda: stats, "draft").report()]).decode()
    found = samples_of(text, "method")
    assert found["torchweave_draft_tokens_total", "draft"] == 9
    assert found["torchweave_accepted_draft_tokens_total", "draft"] == 7
    assert found["vllm_spec_decode_num_draft_tokens_total", "draft"] == 9


def test_what_was_observed_is_taken_once() -> None:
    metrics = EngineMetrics("m", 8, Stats)
    metrics.note_step(0.01, None)
    assert metrics.take_observed() == []  # nobody had asked to keep it
    metrics.note_step(0.02, 0.03)
    taken = metrics.take_observed()
    assert taken == [
        ("torchweave_step_seconds", 0.02),
        ("torchweave_inter_token_latency_seconds", 0.03),
    ]
    assert metrics.take_observed() == []


def test_a_dying_engine_says_what_it_was_doing(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        runner = FailingRunner(LIMITS)
        async with running(runner) as engine:
            async for _ in engine.generate(make_request("ends", 10, 3)):
                pass
            stream = engine.generate(make_request("stays", 10, 7000))
            await anext(stream)
            runner.fail = True
            with pytest.raises(EngineDead):
                async for _ in stream:
                    pass

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("[Recent]")]
    (ended,) = [json.loads(line.partition(": ")[2]) for line in lines if "ended" in line]
    (still_open,) = [json.loads(line.partition(": ")[2]) for line in lines if "open" in line]
    assert (ended["reason"], ended["completion_tokens"], ended["prompt_tokens"]) == (
        "length",
        3,
        10,
    )
    assert 0 <= ended["queue_s"] <= ended["ttft_s"] <= ended["total_s"]
    assert still_open["request_id"] != ended["request_id"]
    assert not any("token_ids" in line or "text" in line for line in lines)
