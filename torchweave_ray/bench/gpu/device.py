"""The device that is measured: its ceilings, and how long something takes there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_BYTES = 1 << 30
_SQUARE = 8192


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a plain copy and the vendor's bf16 product reach."""

    gbyte_s: float
    tflop_s: float


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "CPU, by Triton's interpreter: the times mean nothing"
    return torch.cuda.get_device_name(device)


def measure_ceilings(device: torch.device) -> Ceilings:
    size, square = (_COPY_BYTES, _SQUARE) if device.type != "cpu" else (1 << 20, 128)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(square, square, dtype=torch.bfloat16, device=device)
    copy_us = time_us(lambda: target.copy_(source), device)
    product_us = time_us(lambda: a @ a, device)
    return Ceilings(2 * size / copy_us / 1e3, 2 * square**3 / product_us / 1e6)


def time_us(run: Callable[[], object], device: torch.device) -> float:
    """Median microseconds of one run, caches emptied before each on a GPU."""
    if device.type == "cpu":
        run()
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=200, return_mode="median")) * 1e3


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)
