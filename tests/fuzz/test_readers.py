"""Model files that are nearly right: read, or refused in our own words. By hand, and longer:
`python -m tests.fuzz.readers`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import READERS, run

MANY = {"gguf": 70_000, "safetensors": 70_000, "artifact": 40_000, "adapter": 40_000}


@pytest.mark.parametrize("kind", READERS)
def test_a_few(kind: str) -> None:
    problems: list[str] = []
    run(kind, seed=1, numbers=range(300), report=problems.append)
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_many(kind: str) -> None:
    """In a process of its own: should a reader crash, this one says so."""
    command = [sys.executable, "-m", "tests.fuzz.readers", kind, "--num", str(MANY[kind])]
    ended = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3600
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
