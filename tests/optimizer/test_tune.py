"""Step costs: measured into the report, and used only where they were measured."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.measuring.step_cost import MeasuredStep, StepCost, fit_step_cost
from optimizer.pipeline import optimize
from tests.tiny import make_checkpoint
from torchweave_ray.build import LoadedModel, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.kernels.machine import cpu_model, fingerprint, num_cores
from torchweave_ray.models.artifact import write_report

STEPS = ((1, 64.5), (8, 516.0), (8, 3844.0), (128, 8192.0), (128, 57344.0), (512, 131072.0))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    source = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    return optimize(source, tmp_path / "store")


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
    assert tuning["fingerprint"] == fingerprint("torch", num_cores())
    assert len(tuning["steps"]) == 8
    assert all(step["ms"] > 0 for step in tuning["steps"])
    cost = _load(artifact).step_cost
    assert cost is not None
    assert {"a": cost.a, "b": cost.b, "c": cost.c} == tuning["step_cost"]


def test_configured_costs_come_first(artifact: Path) -> None:
    given = {"a": 1.0, "b": 2.0, "c": 3.0}
    cost = _load(artifact, scheduler={"step_cost": given}).step_cost
    assert cost is not None
    assert (cost.a, cost.b, cost.c) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: report["tuning"]["fingerprint"].update(cpu="Z80"), "tuned on .*Z80"),
        (lambda report: report["tuning"]["fingerprint"].update(threads=99), "'threads': 99"),
        (lambda report: report.pop("tuning"), "it was not tuned"),
        (lambda report: report["tuning"]["step_cost"].pop("b"), "cannot be read"),
        (lambda report: report.update(tuning=3), "cannot be read"),
    ],
)
def test_foreign_or_broken_costs_only_warn(
    artifact: Path, caplog: pytest.LogCaptureFixture, change: Any, says: str
) -> None:
    _edit(artifact, change)
    assert _load(artifact).step_cost is None
    assert ("step costs" in caplog.text) is ("tuned on" in says or "threads" in says)
    with caplog.at_level(logging.WARNING):
        assert _load(artifact, scheduler={"max_step_ms": 20.0}).step_cost is None
    assert "max_step_ms has no effect" in caplog.text
    assert [r for r in caplog.records if "step costs" in r.message and re.search(says, r.message)]


@pytest.mark.parametrize("text", [None, "", "{", "[1]"])
def test_a_report_is_no_part_of_the_artifact(artifact: Path, text: str | None) -> None:
    report = artifact / "report.json"
    report.unlink()
    if text is not None:
        report.write_text(text)
    assert _load(artifact).step_cost is None


def test_cpu_names(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping: 1\n\nprocessor: 1\n"
    )
    assert cpu_model(cpuinfo) == "AMD EPYC 17 1"
    cpuinfo.write_text("Features : asimd\n")
    assert cpu_model(cpuinfo)
    assert cpu_model(tmp_path / "none")
