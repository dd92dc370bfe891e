"""Which kernels are taken, and what is refused, where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_artifact
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.attention.varlen import why_no_varlen
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ConfigError
from torchweave_ray.llm import LLM
from torchweave_ray.runner.backends import choose_kernels
from torchweave_ray.runner.device import why_no_triton

CPU = torch.device("cpu")


def test_a_cpu_gets_plain_torch_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    kernels = choose_kernels(CPU, EngineConfig())
    assert isinstance(kernels.attention, TorchPagedAttention)
    assert kernels.ops is None
    assert "plain torch: the device is a CPU" in caplog.text


@pytest.mark.parametrize(
    ("block_size", "why"), [(16, "block_size 16 is no multiple of 256"), (512, None)]
)
def test_torchs_own_attention_needs_large_blocks(block_size: int, why: str | None) -> None:
    found = why_no_varlen(block_size)
    assert found is None if why is None else why in (found or "")


def test_triton_that_is_asked_for_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = EngineConfig.from_dict({"runner": {"executor": "triton"}})
    with pytest.raises(ConfigError, match="'triton', but the device is a CPU"):
        choose_kernels(CPU, config)


def test_torchs_own_attention_is_refused_without_a_gpu() -> None:
    config = EngineConfig.from_dict({"runner": {"attention": "varlen"}})
    with pytest.raises(ConfigError, match="'varlen', but the device is a CPU"):
        choose_kernels(CPU, config)


def test_triton_is_not_taken_for_a_cpu() -> None:
    assert why_no_triton(CPU) == "the device is a CPU"


def test_invariance_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="batch_invariant: the torch executor"):
        LLM(artifact, runner={"batch_invariant": True, "executor": "torch"})
    LLM(artifact, runner={"batch_invariant": True, "executor": "native"}).close()
