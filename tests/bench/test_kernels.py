"""`bench kernels` on a small shape: every figure is there and none is nonsense."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from torchweave_ray.bench import kernels
from torchweave_ray.cli.app import build_app
from torchweave_ray.kernels.library import ISA_VARIABLE, KernelsUnavailable, load_library


def _run(*args: str) -> Result:
    return CliRunner().invoke(build_app(), ["bench", "kernels", *args])


def test_each_shape_and_row_count_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "SHAPES", {"small": (("a", 64, 32), ("b", 33, 100))})
    monkeypatch.setattr(kernels, "_CACHE_BYTES", 1 << 16)
    result = _run("--rows", "1,5", "--threads", "1", "--seconds", "0")
    assert result.exit_code == 0, result.output
    points = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(p["product"], p["rows"]) for p in points] == [("a", 1), ("a", 5), ("b", 1), ("b", 5)]
    assert all(p["native_us"] > 0 and p["torch_us"] > 0 and p["gflop_s"] > 0 for p in points)
    assert "GFLOP/s" in result.stderr


def test_bad_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--model" in _run("--model", "gpt-9").output
    monkeypatch.setenv(ISA_VARIABLE, "none")
    result = _run()
    assert result.exit_code == 1
    assert ISA_VARIABLE in result.output
