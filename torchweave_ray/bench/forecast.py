"""How fast a model should decode here: what the machine can read and multiply, over what a model's
step must. Measured in a second, checked against measured figures (docs/performance.md).

A step of n clients takes weights / bandwidth + n * 2 * parameters / arithmetic: at few clients it
waits for memory, at many it multiplies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REACHED_READ = 0.65
"""Of the bandwidth, by a whole step: attention, norms, sampling and serving take the rest."""
REACHED_MULTIPLY = 0.6
BESIDE_BYTES = int(1.5 * 2**30)
"""Beside the weights: Ray, the ingress, the replica's own, a small KV cache."""
BYTES_A_WEIGHT: Mapping[str, float] = {
    "bf16": 2.0,
    "int8": 1.0,
    "int8-group32": 1.0625,
    "int4-group32": 0.625,
}
SIZES: Mapping[str, float] = {
    "0.5B": 0.5e9,
    "1B": 1e9,
    "3B": 3e9,
    "8B": 8e9,
    "14B": 14e9,
    "32B": 32e9,
    "70B": 70e9,
}
_LINEAR = 4096
"""Rows and columns of the product that torch is measured by: 32 MiB in bf16."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one device reaches at most, all its threads together."""

    device: str
    by: str
    """Whose loops were measured: our kernels', or torch's."""
    read_gbyte_s: float
    multiply_gflop_s: Mapping[str, float]
    """By format of weights: those that run here."""
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Output tokens a second of all clients together."""

    name: str
    format: str
    weight_bytes: int
    fits: bool
    tok_s: Mapping[int, float]
    """By clients; {} where it does not fit."""
    bound: str
    """What one client waits for."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_capacity(device: str, memory_bytes: int, seconds: float = 0.2) -> Capacity:
    """Some `seconds` for each figure. `device`: cpu or cuda."""
    from torchweave_ray.bench.kernels import FORMATS, measure_ceilings
    from torchweave_ray.bench.origin import describe_machine
    from torchweave_ray.errors import TorchWeaveError
    from torchweave_ray.kernels.library import KernelsUnavailable, load_library

    if device == "cpu":
        try:
            team = load_library().create_team(describe_machine().cores)
        except (KernelsUnavailable, TorchWeaveError):
            pass
        else:
            top = measure_ceilings(team, seconds)
            speeds = dict.fromkeys(map(str, FORMATS), top.int8_gflop_s) | {"bf16": top.bf16_gflop_s}
            return Capacity(device, "our kernels", top.read_gbyte_s, speeds, memory_bytes)
    read, multiply = _measure_torch(device, seconds)
    return Capacity(device, "torch", read, {"bf16": multiply}, memory_bytes)


def _measure_torch(device: str, seconds: float) -> tuple[float, float]:
    """(GB/s, GFLOP/s) of torch's bf16 products of one row, and of 256."""
    import torch

    weights = [
        torch.ones(_LINEAR, _LINEAR, dtype=torch.bfloat16, device=device)
        for _ in range(2 if device == "cpu" else 16)
    ]
    found = []
    for rows in (1, 256):
        x = torch.ones(rows, _LINEAR, dtype=torch.bfloat16, device=device)
        best, end = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            if device != "cpu":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        found.append(best / len(weights))
    one, many = found
    read = 2 * _LINEAR**2 / one / 1e9
    return round(read, 1), round(2 * 256 * _LINEAR**2 / many / 1e9, 1)


def forecast(
    name: str,
    format: str,
    weight_bytes: int,
    capacity: Capacity,
    clients: tuple[int, ...] = (1, 16),
) -> Forecast:
    """`weight_bytes`: what a step reads."""
    num_weights = weight_bytes / BYTES_A_WEIGHT[format]
    read_s = weight_bytes / (REACHED_READ * capacity.read_gbyte_s * 1e9)
    multiply_s = 2 * num_weights / (REACHED_MULTIPLY * capacity.multiply_gflop_s[format] * 1e9)
    fits = weight_bytes + BESIDE_BYTES <= capacity.memory_bytes
    speeds = {n: round(n / (read_s + n * multiply_s), 1) for n in clients}
    bound = "memory bandwidth" if read_s > multiply_s else "arithmetic"
    return Forecast(name, format, weight_bytes, fits, speeds if fits else {}, bound)


def forecast_sizes(capacity: Capacity) -> list[Forecast]:
    """Models by their number of weights, in the formats that are worth choosing between."""
    kinds = [kind for kind in ("bf16", "int8", "int4-group32") if kind in capacity.multiply_gflop_s]
    return [
        forecast(size, kind, int(num * BYTES_A_WEIGHT[kind]), capacity)
        for size, num in SIZES.items()
        for kind in kinds
    ]


def forecast_artifact(folder: Path, capacity: Capacity) -> Forecast | None:
    """None: of a kind whose step does not read all weights, or that is not read here.

    Raises ArtifactError.
    """
    from torchweave_ray.models.artifact import read_manifest

    manifest = read_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    format = manifest.quantization.get("layers") or {"bfloat16": "bf16"}.get(
        manifest.dtype, manifest.dtype
    )
    if format not in capacity.multiply_gflop_s or any("expert" in key for key in config):
        return None
    num_bytes = sum(e.size for n, e in manifest.files.items() if n.endswith(".safetensors"))
    if not config.get("tie_word_embeddings", False):  # of the input's table a row is read
        table = config.get("vocab_size", 0) * config.get("hidden_size", 0)
        num_bytes = max(1, num_bytes - int(2 * table))
    return forecast(folder.name, format, num_bytes, capacity)
