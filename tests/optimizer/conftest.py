"""A small model to stage. Tiny models are measured for a moment only, and calibrated on few tokens:
for speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.measuring import quality, step_cost
from optimizer.progress import SilentProgress
from tests.tiny import make_checkpoint


class Recorder(SilentProgress):
    def __init__(self) -> None:
        self.started: list[str] = []

    def start(self, stage: str) -> None:
        self.started.append(stage)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "MAX_REPEATS", 1)
    monkeypatch.setattr(quality, "MAX_CALIBRATION_TOKENS", 512)
