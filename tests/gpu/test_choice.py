"""Which kernels are taken, and what is refused, where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_artifact
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.config import RunnerConfig
from torchweave_ray.errors import ConfigError
from torchweave_ray.llm import LLM
from torchweave_ray.runner.backends import choose_kernels
from torchweave_ray.runner.device import why_no_triton

CPU = torch.device("cpu")


def test_a_cpu_gets_plain_torch_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    kernels = choose_kernels(CPU, RunnerConfig())
    assert isinstance(kernels.attention, TorchPagedAttention)
    assert kernels.ops is None
    assert "plain torch: the device is a CPU" in caplog.text


def test_triton_is_not_taken_for_a_cpu() -> None:
    assert why_no_triton(CPU) == "the device is a CPU"


def test_invariance_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="batch_invariant: the torch executor"):
        LLM(artifact, runner={"batch_invariant": True, "executor": "torch"})
    LLM(artifact, runner={"batch_invariant": True, "executor": "native"}).close()
