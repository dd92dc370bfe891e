"""Tiny models are measured for a moment only: what they cost is of no interest."""

from __future__ import annotations

import pytest

from optimizer.measuring import step_cost


@pytest.fixture(autouse=True)
def _measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "BATCH_S", 0.0)
