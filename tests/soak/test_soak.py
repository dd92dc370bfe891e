"""Two minutes of it; `make soak` is the same for half an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.soak import soak

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHORT_SLOPE = 3.0
"""MB per 1,000 requests: two minutes fill no allocator; the bar of half an hour is 1."""


def test_two_minutes(tmp_path: Path) -> None:
    report = soak(tmp_path, seconds=120)
    print(report)
    assert not report.problems(SHORT_SLOPE)
