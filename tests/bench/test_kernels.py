"""`bench kernels` on a small shape: every figure is there and none is nonsense."""

from __future__ import annotations

import itertools
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
    ceilings, *points = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(ceilings[name] > 0 for name in ("read_gbyte_s", "bf16_gflop_s", "int8_gflop_s"))
    found = [(p["product"], p["format"], p["rows"]) for p in points]
    assert found == list(itertools.product(("a", "b"), kernels.FORMATS, (1, 5)))
    assert all(p["native_us"] > 0 and p["torch_us"] > 0 and p["gflop_s"] > 0 for p in points)
    assert "GFLOP/s" in result.stderr


def test_bad_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--model" in _run("--model", "gpt-9").output
    assert "--formats" in _run("--formats", "int8,int3").output
    monkeypatch.setenv(ISA_VARIABLE, "none")
    result = _run()
    assert result.exit_code == 1
    assert ISA_VARIABLE in result.output
