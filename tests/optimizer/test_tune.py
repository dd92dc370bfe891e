"""Step costs: measured into the report, and used only where they were measured."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.measuring import step_cost
from optimizer.measuring.step_cost import MeasuredStep, StepCost, fit_step_cost
from optimizer.pipeline import optimize
from optimizer.recipe import Recipe
from optimizer.stages.tune import choose_threads, knee
from tests.tiny import make_checkpoint
from torchweave_ray.build import LoadedModel, load_model
from torchweave_ray.config import EngineConfig, SchedulerConfig
from torchweave_ray.config import StepCost as Costs
from torchweave_ray.kernels.machine import cpu_model, fingerprint, num_cores
from torchweave_ray.loading.tuning import TunedSettings, tuned_settings, tuned_threads
from torchweave_ray.models.artifact import write_report
from torchweave_ray.runner.device import gpu_fingerprint

STEPS = ((1, 64.5), (8, 516.0), (8, 3844.0), (128, 8192.0), (128, 57344.0), (512, 131072.0))


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step_cost, "MAX_REPEATS", 1)
        source = make_checkpoint(folder / "tiny", num_hidden_layers=1)
        return optimize(source, folder / "store")


@pytest.fixture
def artifact(staged: Path, tmp_path: Path) -> Path:
    """A copy of its own: tests edit the report."""
    return shutil.copytree(staged, tmp_path / staged.name)


def _load(artifact: Path, **options: Any) -> LoadedModel:
    given = {"max_model_len": 64, "cache": {"kv_memory": 1 << 22}, **options}
    return load_model(artifact, EngineConfig.from_dict(given))


def _edit(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    report = json.loads((artifact / "report.json").read_text())
    change(report)
    write_report(artifact, {k: v for k, v in report.items() if k != "report_sha256"})


def test_a_fit_finds_the_coefficients() -> None:
    true = StepCost(12.0, 0.4, 0.001)
    steps = [MeasuredStep(n, c, true.a + true.b * n + true.c * c) for n, c in STEPS]
    found = fit_step_cost(steps)
    assert (found.a, found.b, found.c) == pytest.approx((12.0, 0.4, 0.001), rel=1e-4)


def test_no_coefficient_is_negative() -> None:
    falling = [MeasuredStep(n, c, 5.0 - n / 200) for n, c in STEPS]
    found = fit_step_cost(falling)
    assert found.a > 0
    assert min(found.b, found.c) >= 0
    one = fit_step_cost([MeasuredStep(1, 1.0, 3.0)])
    assert one.predict(MeasuredStep(1, 1.0, 0.0)) == pytest.approx(3.0, rel=1e-4)


def test_the_report_has_them_and_a_replica_here_uses_them(artifact: Path) -> None:
    tuning = json.loads((artifact / "report.json").read_text())["tuning"]
    assert tuning["fingerprint"] == fingerprint("torch", tuning["fingerprint"]["threads"])
    assert len(tuning["steps"]) == 13
    assert all(step["ms"] > 0 for step in tuning["steps"])
    cost = _load(artifact).tuned.step_cost
    assert cost is not None
    assert {"a": cost.a, "b": cost.b, "c": cost.c} == tuning["step_cost"]


def test_configured_settings_come_first(artifact: Path) -> None:
    tuned = _load(artifact).tuned
    assert tuned.step_cost is not None
    assert tuned.max_num_batched_tokens is not None
    given = SchedulerConfig(step_cost=Costs(1.0, 2.0, 3.0), max_num_batched_tokens=77)
    assert tuned.fill(given) == given
    left_open = tuned.fill(SchedulerConfig())
    assert left_open.step_cost == tuned.step_cost
    assert left_open.step_tokens == max(32, tuned.max_num_batched_tokens)
    assert (
        tuned.fill(SchedulerConfig(max_num_seqs=5000, max_num_batched_tokens=None)).step_tokens
        == 5000
    )


def test_threads_are_those_that_were_fastest(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this CPU only, and never more than the process has cores."""
    _edit(artifact, lambda report: report["tuning"]["fingerprint"].update(threads=1))
    assert tuned_threads(artifact) == 1
    loaded = _load(artifact)
    assert torch.get_num_threads() == 1
    assert loaded.tuned.step_cost is not None
    _edit(artifact, lambda report: report["tuning"]["fingerprint"].update(threads=10_000))
    assert tuned_threads(artifact) == num_cores()
    _edit(artifact, lambda report: report["tuning"]["fingerprint"].update(cpu="Z80"))
    assert tuned_threads(artifact) is None


def test_fewer_threads_must_be_clearly_faster() -> None:
    def probed(ms: float) -> dict[Any, MeasuredStep]:
        return {batch: MeasuredStep(1, 1.0, ms) for batch in ("a", "b")}

    assert choose_threads({4: probed(10.0), 2: probed(9.2)}) == 4
    assert choose_threads({4: probed(10.0), 2: probed(8.0)}) == 2
    assert choose_threads({4: probed(10.0)}) == 4


def test_chunks_are_as_small_as_their_speed_allows() -> None:
    assert knee({"32": 50.0, "128": 98.0, "256": 100.0}) == 128
    assert knee({}) is None


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"target": "sm_90"}, "sm_90, and only CPUs are measured"),
        ({"target": "avx2"}, "target is avx2, this machine's instruction set is"),
        ({"tuning_budget_s": 0}, "tuning_budget_s is 0"),
    ],
)
def test_what_is_not_measured_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recipe: dict[str, Any], says: str
) -> None:
    source = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    artifact = optimize(Recipe("t", str(source), **recipe), tmp_path / "store")
    assert "t is not tuned: the recipe's" in caplog.text
    report = json.loads((artifact / "report.json").read_text())
    assert says in report["tuning"]["skipped"]
    assert ("skipped" in report["speed"]) is ("target" in recipe)
    tuned = _load(artifact).tuned
    assert tuned == TunedSettings()
    assert tuned.fill(SchedulerConfig()).step_tokens == 512


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: report["tuning"]["fingerprint"].update(cpu="Z80"), "tuned on .*Z80"),
        (lambda report: report["tuning"]["fingerprint"].update(cores=99), "'cores': 99"),
        (lambda report: report.pop("tuning"), "it was not tuned"),
        (lambda report: report["tuning"]["step_cost"].pop("b"), "cannot be read"),
        (lambda report: report.update(tuning=3), "cannot be read"),
    ],
)
def test_foreign_or_broken_costs_only_warn(
    artifact: Path, caplog: pytest.LogCaptureFixture, change: Any, says: str
) -> None:
    _edit(artifact, change)
    assert _load(artifact).tuned.step_cost is None
    assert ("step costs" in caplog.text) is ("tuned on" in says or "cores" in says)
    with caplog.at_level(logging.WARNING):
        assert _load(artifact, scheduler={"max_step_ms": 20.0}).tuned.step_cost is None
    assert "max_step_ms has no effect" in caplog.text
    assert [r for r in caplog.records if "step costs" in r.message and re.search(says, r.message)]


@pytest.mark.parametrize("text", [None, "", "{", "[1]"])
def test_a_report_is_no_part_of_the_artifact(artifact: Path, text: str | None) -> None:
    report = artifact / "report.json"
    report.unlink()
    if text is not None:
        report.write_text(text)
    assert _load(artifact).tuned.step_cost is None


def test_cpu_names(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping: 1\n\nprocessor: 1\n"
    )
    assert cpu_model(cpuinfo) == "AMD EPYC 17 1"
    cpuinfo.write_text("Features : asimd\n")
    assert cpu_model(cpuinfo)
    assert cpu_model(tmp_path / "none")


def test_costs_of_one_gpu_are_not_taken_for_another(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def found(name: str, *capability: int) -> dict[str, str | int]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return {**gpu_fingerprint(torch.device("cuda")), "executor": "triton"}

    here = found("H200", 9, 0)
    _edit(artifact, lambda report: report["tuning"].update(fingerprint=here))
    assert tuned_settings(artifact, here, SchedulerConfig()).step_cost is not None
    elsewhere = found("A100", 8, 0)
    assert tuned_settings(artifact, elsewhere, SchedulerConfig()) == TunedSettings()
    assert "sm_90" in caplog.text
    assert "sm_80" in caplog.text
