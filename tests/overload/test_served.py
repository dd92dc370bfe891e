"""The real server at three times its capacity, as scripts/limits/overload.py measures it; short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.weights, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
GOODPUT = 0.8
"""Of capacity; 0.9 on a machine that has nothing else to do (docs/performance.md)."""


def test_it_does_what_it_can_and_refuses_the_rest() -> None:
    command = [sys.executable, "scripts/limits/overload.py", "--seconds", "30"]
    command += ["--capacity-s", "50", "--looks", "2"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    _, overload, retry_after = map(json.loads, ran.stdout.splitlines())
    print(ran.stdout)
    assert overload["goodput_share"] > GOODPUT
    assert overload["refused"] > overload["served"]
    assert overload["other_statuses"] == {}
    assert overload["refused_p50_ms"] < 100
    assert retry_after["looks"]
