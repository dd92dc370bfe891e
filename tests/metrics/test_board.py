"""Our board's queries, asked of a real Prometheus that scrapes a real server under traffic."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.metrics.board import Shown, our_queries, watch
from tests.tiny import make_tiny_artifact

ROOT = Path(__file__).resolve().parent.parent.parent
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no Prometheus here: apt-get install prometheus",
)
SECONDS = 24.0
TINY_KV_BYTES = 2 * 2 * 2 * 16 * 4
"""A token's: keys and values of 2 layers, 2 heads of 16, in 4 bytes."""
OF_OTHER_ENGINES = ("Scheduler: Swapped", "NIXL: ", "KV Offload: ")
EITHER = {"KV Offload: Overall Prefix Hit Rate", "Peak Tokens Per Second Per Model Last 24 Hours"}
"""The first reads a metric of ours all the same, the second one sample of every whole minute."""


def test_the_board_reads_what_the_page_of_metrics_lists() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    listed = {name for row in re.findall(r"^\| (`.+?) \|", page, re.M) for name in row.split(", ")}
    read = {name for _, query in our_queries() for name in re.findall(r"torchweave_(\w+)", query)}
    known = {name.strip("`") for name in listed}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in read} <= known


@needs_prometheus
def test_the_alert_rules_are_sound() -> None:
    config = ROOT / "configs/prometheus/prometheus.yaml"
    command = ["promtool", "check", "config", str(config)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_prometheus
@pytest.mark.ray
@pytest.mark.slow
def test_no_panel_is_empty_in_a_real_run(tmp_path: Path) -> None:
    found = watch(make_tiny_artifact(tmp_path / "tiny"), SECONDS, TINY_KV_BYTES)
    assert {200, 400, 429} <= found["statuses"].keys() <= {200, 400, 429, 503}, found["statuses"]
    ours: list[Shown] = found["boards"]["TorchWeave Ray"]
    assert len(ours) > 20
    still = {shown.panel for shown in ours if not shown.moved}
    assert not still, {shown.panel: shown.series for shown in ours if not shown.moved}
    rays: list[Shown] = found["boards"]["Serve LLM"]
    empty = {shown.panel for shown in rays if not shown.series} - EITHER
    assert empty == {s.panel for s in rays if s.panel.startswith(OF_OTHER_ENGINES)} - EITHER
