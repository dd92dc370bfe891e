"""benchmarks/gpu.sh runs from end to end without a GPU; its checks must pass there, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton, the language of the kernels, is not installed")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"


@pytest.mark.slow
@pytest.mark.parametrize("section", ["correctness", "kernels", "throughput"])
def test_without_a_gpu(section: str) -> None:
    ran = subprocess.run(
        [str(SCRIPT), "--dry-run", "--sections", section],
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert lines
    assert {line["section"] for line in lines} == {section}
    assert not [line for line in lines if isinstance(line.get("error"), str)]
    assert not [line for line in lines if not line.get("same_tokens", True)]
