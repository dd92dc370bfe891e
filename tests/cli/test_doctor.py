"""What `torchweave doctor` expects of a machine, beside what was measured on one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import make_tiny_artifact
from torchweave_ray.bench.forecast import (
    BYTES_A_WEIGHT,
    Capacity,
    _measure_torch,
    forecast,
    forecast_artifact,
    forecast_sizes,
    measure_capacity,
)
from torchweave_ray.cli.app import build_app
from torchweave_ray.cli.checks import Check
from torchweave_ray.cli.doctor import _print

GIB = 2**30
SPEEDS = {"bf16": 400.0, "int8": 800.0, "int4-group32": 800.0}
HERE = Capacity("cpu", "our kernels", 20.0, SPEEDS, 8 * GIB)


def test_a_step_by_hand() -> None:
    """1 GB of bf16: 77 ms of reading at 13 GB/s, and 4.2 ms a client of 1 GFLOP at 240 GFLOP/s."""
    found = forecast("1B", "bf16", 10**9, HERE)
    assert found.tok_s[1] == pytest.approx(1 / (1 / 13 + 1 / 240), rel=0.01)
    assert found.tok_s[16] == pytest.approx(16 / (1 / 13 + 16 / 240), rel=0.01)
    assert (found.fits, found.bound) == (True, "memory bandwidth")
    slow = Capacity("cpu", "our kernels", 20.0, {"bf16": 4.0}, 8 * GIB)
    assert forecast("1B", "bf16", 10**9, slow).bound == "arithmetic"


def test_what_does_not_fit_has_no_speed() -> None:
    found = {(f.name, f.format): f for f in forecast_sizes(HERE)}
    assert found["8B", "int4-group32"].fits
    assert not found["8B", "int8"].fits  # 7.5 GiB, and 1.5 beside them
    assert found["8B", "int8"].tok_s == {}
    only = forecast_sizes(Capacity("cuda", "torch", 2000.0, {"bf16": 1e5}, 80 * GIB))
    assert {f.format for f in only} == {"bf16"}


def test_an_artifact_is_read_but_for_its_table_of_embeddings(tmp_path: Path) -> None:
    folder = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    assert not config.get("tie_word_embeddings")
    found = forecast_artifact(folder, HERE)
    assert found is not None
    size = (folder / "model.safetensors").stat().st_size
    table = 2 * config["vocab_size"] * config["hidden_size"]
    assert found.weight_bytes == size - table
    assert forecast_artifact(make_tiny_artifact(tmp_path / "float32"), HERE) is None


def test_this_machine_is_measured() -> None:
    capacity = measure_capacity("cpu", GIB, seconds=0.01)
    assert capacity.read_gbyte_s > 0
    assert min(capacity.multiply_gflop_s.values()) > 0
    assert set(capacity.multiply_gflop_s) <= set(BYTES_A_WEIGHT)
    assert min(_measure_torch("cpu", 0.01)) > 0


def test_the_command_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)
    monkeypatch.setenv("ARTIFACT_DIR", str(tmp_path))
    monkeypatch.delenv("ARTIFACT_MODEL_DIR", raising=False)
    whole = CliRunner().invoke(build_app(), ["doctor", "--json"])
    values = json.loads(whole.stdout)
    assert values["forecast"][0]["name"] == "tiny"
    assert values["capacity"]["device"] in ("cpu", "cuda")
    assert values["artifacts"][0]["status"] == "ok"


def test_the_table_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    _print([Check("cpu", "ok", "two cores")], HERE, forecast_sizes(HERE))
    table = capsys.readouterr().out
    assert "cpu reads 20 GB/s and multiplies, in GFLOP/s, 400 in bf16, 800 in int8 (by" in table
    assert re.search(r"^1B +int8 +0.9 +12 +", table, re.MULTILINE)
    assert re.search(r"^8B +bf16 +14.9 +- +- +does not fit", table, re.MULTILINE)
