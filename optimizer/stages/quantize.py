"""Stage 4: codes and scales in place of weights, row-major, by the recipe's format of each group.

A source that holds a tensor in that very format keeps its codes; others are rounded to nearest,
from the source's own numbers and not from what `convert` rounded to bfloat16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimizer.checkpoints import Checkpoint
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.stages.fetch import open_fetched
from optimizer.store import link_file, write_atomically
from optimizer.tensor_file import DTYPES, write_tensors
from torchweave_ray.kernels.quantization import (
    QuantizedLinear,
    concat_rows,
    dequantize,
    quantize,
)
from torchweave_ray.models.artifact import WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig, read_hf_config
from torchweave_ray.models.tensors import FusedTensor, fused_tensors

RESULT = "quantization.json"
_DIGITS = 6


@dataclass(slots=True)
class GroupReport:
    format: str
    num_lossless: int = 0
    """Tensors that hold the source's own codes."""
    num_rounded: int = 0
    relative_errors: dict[str, float] = field(default_factory=dict)
    """Of the rounded ones: root of the squared error over the squared weights."""


@dataclass(frozen=True)
class QuantizeStage:
    recipe: Recipe
    progress: Progress
    name: str = "quantize"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"quantization": self.recipe.quantization.canonical()}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Fills `quantization`, and leaves what it did to each group in RESULT."""
        source, folder = work / "fuse", work / self.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.progress.expect((source / WEIGHTS).stat().st_size)
        reports: dict[str, GroupReport] = {}
        if self.recipe.quantization.is_any:
            manifest = self._quantize(work, manifest, reports)
        else:
            link_file(source / WEIGHTS, folder / WEIGHTS)
            self.progress.advance((source / WEIGHTS).stat().st_size)
        said = {group: asdict(report) for group, report in reports.items()}
        write_atomically(folder / RESULT, json.dumps(said))
        return manifest

    def _quantize(
        self, work: Path, manifest: Manifest, reports: dict[str, GroupReport]
    ) -> Manifest:
        config = ModelConfig.from_hf(read_hf_config(work / "fuse"))
        products = {t.name: t.group for t in fused_tensors(config) if t.group}
        quantization = self.recipe.quantization.formats(products)
        tensors = fused_tensors(config, quantization)
        dtype = DTYPES[manifest.dtype]
        checkpoint = open_fetched(work)
        write_tensors(
            work / self.name / WEIGHTS,
            [entry for tensor in tensors for entry in tensor.row_major(dtype)],
            _parts(work / "fuse" / WEIGHTS, checkpoint, tensors, reports),
            self.progress.advance,
        )
        return replace(manifest, quantization=quantization)


def _parts(
    plain: Path,
    checkpoint: Checkpoint,
    tensors: tuple[FusedTensor, ...],
    reports: dict[str, GroupReport],
) -> Iterator[Tensor]:
    with safe_open(plain, framework="pt", device="cpu") as file:
        for tensor in tensors:
            if tensor.format == "bf16":
                yield file.get_tensor(tensor.name)
                continue
            report = reports.setdefault(tensor.group, GroupReport(tensor.format))
            weight = quantize_fused(tensor, checkpoint, report)
            yield from (weight.codes, weight.scales)
            if weight.mins is not None:
                yield weight.mins


def quantize_fused(
    tensor: FusedTensor, checkpoint: Checkpoint, report: GroupReport
) -> QuantizedLinear:
    """The fused weight in its format, part by part; `report` is added to."""
    assert tensor.format != "bf16"
    parts = []
    error = size = 0.0
    is_lossless = True
    for name in tensor.sources:
        part = checkpoint.codes(name)
        if part is None or part.format != tensor.format:
            weight = checkpoint.load(name).float()
            part = quantize(weight, tensor.format)
            error += float((dequantize(part) - weight).square().sum(dtype=torch.float64))
            size += float(weight.square().sum(dtype=torch.float64))
            is_lossless = False
        parts.append(part)
    if is_lossless:
        report.num_lossless += 1
    else:
        report.num_rounded += 1
        relative = (error / size) ** 0.5 if size else 0.0
        report.relative_errors[tensor.name] = round(relative, _DIGITS)
    return concat_rows(parts)
