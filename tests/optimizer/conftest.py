"""Tiny models are measured for a moment only, and calibrated on few tokens: for speed."""

from __future__ import annotations

import pytest

from optimizer.measuring import quality, step_cost


@pytest.fixture(autouse=True)
def _measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "MAX_REPEATS", 1)
    monkeypatch.setattr(quality, "MAX_CALIBRATION_TOKENS", 512)
