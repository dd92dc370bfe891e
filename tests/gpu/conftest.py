"""Triton kernels on a GPU where there is one, else under Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported, so it is chosen here.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from torchweave_ray.kernels.triton.interpreter import interpret

IS_GPU = torch.cuda.is_available()
if not IS_GPU and importlib.util.find_spec("triton") is not None:
    interpret()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if IS_GPU else "cpu")
