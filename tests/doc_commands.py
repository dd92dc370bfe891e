"""Runs the documentation's blocks as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run_block(
    language: str, code: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """In the checkout, with this environment's commands first on the path."""
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
