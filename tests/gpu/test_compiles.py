"""Every kernel compiles for GPUs that are not there, and fits their shared memory: by the launches
of the real code, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton, the language of the kernels, is not installed")

KERNELS = "attend merge write_kv rms_norm gated rotate_and_write linear sample"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for(capability: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.gpu.launches", str(capability)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert set(json.loads(ran.stdout)) >= set(KERNELS.split())
