"""Stage 4: codes and scales in place of weights, row-major, by the recipe's format of each group.

A source that holds a tensor in that very format keeps its codes; others are rounded by the recipe's
method, from the source's own numbers and not from what `convert` rounded to bfloat16.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimizer.calibration import Calibration
from optimizer.checkpoints import Checkpoint
from optimizer.gptq import Moments, quantize_compensating
from optimizer.measuring.model import all_cores, torch_threads
from optimizer.measuring.quality import calibration_windows
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.stages.fetch import open_fetched
from optimizer.store import link_file, write_atomically
from optimizer.tensor_file import DTYPES, TensorWriter
from torchweave_ray.kernels.quantization import (
    QuantizedFormat,
    QuantizedLinear,
    concat_rows,
    dequantize,
    quantize,
)
from torchweave_ray.models.artifact import TOKENIZER, WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import FusedTensor, StoredTensor, fused_tensors

RESULT = "quantization.json"
_DIGITS = 6
_PIECE = 4 << 20
"""Elements that are rounded at once, in fp32 and with some temporaries of that size."""
_SYNC_BYTES = 8 << 20
"""Compensating takes long for what it writes, so a killed run goes on from closer by."""


@dataclass(slots=True)
class GroupReport:
    format: str
    num_lossless: int = 0
    """Tensors that hold the source's own codes."""
    num_rounded: int = 0
    relative_errors: dict[str, float] = field(default_factory=dict)
    """Of the rounded ones: root of the squared error over the squared weights."""
    output_errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """By method: the same of what the product gives over the calibration text, which is what
    compensating makes small; rtn: what plain rounding of the same inputs would have cost."""


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
        folder.mkdir(exist_ok=True)
        self.progress.expect((source / WEIGHTS).stat().st_size)
        reports: dict[str, GroupReport] = {}
        if self.recipe.quantization.is_any:
            manifest = self._quantize(work, manifest, reports)
        else:
            shutil.rmtree(folder)
            folder.mkdir()
            link_file(source / WEIGHTS, folder / WEIGHTS)
            self.progress.advance((source / WEIGHTS).stat().st_size)
        said = {group: asdict(report) for group, report in reports.items()}
        write_atomically(folder / RESULT, json.dumps(said))
        return manifest

    def _quantize(
        self, work: Path, manifest: Manifest, reports: dict[str, GroupReport]
    ) -> Manifest:
        config = ModelConfig.read(work / "fuse")
        products = {t.name: t.group for t in fused_tensors(config) if t.group}
        quantization = self.recipe.quantization.formats(products)
        tensors = fused_tensors(config, quantization)
        checkpoint = open_fetched(work)
        entries = {t.name: t.row_major(DTYPES[manifest.dtype]) for t in tensors}
        flat = [entry for held in entries.values() for entry in held]
        key = json.dumps([manifest.source_sha256, manifest.recipe], sort_keys=True)
        path = work / self.name / WEIGHTS
        with all_cores(), TensorWriter(path, flat, self.progress.advance, key) as writer:
            calibration = None
            if self.recipe.quantization.method == "gptq" and config.foreign is None:
                writer.sync_bytes = min(writer.sync_bytes, _SYNC_BYTES)
                tokenizer = work / "fuse" / TOKENIZER
                windows = calibration_windows(tokenizer, config.max_position_embeddings)
                calibration = Calibration(config, checkpoint, windows)
            done = _Done(writer, writer.num_done)
            for tensor in tensors:
                if tensor.format == "bf16":
                    with safe_open(work / "fuse" / WEIGHTS, framework="pt", device="cpu") as file:
                        done.write((file.get_tensor(tensor.name),))
                    continue
                report = reports.setdefault(tensor.group, GroupReport(tensor.format))
                moments = None if calibration is None else calibration.moments(tensor.name)
                weight = done.read(tensor, entries[tensor.name])
                if weight is None:
                    weight = quantize_fused(tensor, checkpoint, moments)
                _report_errors(tensor, checkpoint, weight, moments, report)
                if calibration is not None:
                    calibration.replace(tensor.name, weight)
                done.write(_parts(weight))
        return replace(manifest, quantization=quantization)


@dataclass(slots=True)
class _Done:
    """The entries that a killed run has left, which are read instead of made again."""

    writer: TensorWriter
    num_entries: int
    next: int = 0

    def read(
        self, tensor: FusedTensor, entries: tuple[StoredTensor, ...]
    ) -> QuantizedLinear | None:
        if self.next + len(entries) > self.num_entries:
            return None
        assert tensor.format != "bf16"
        held = [self.writer.read(self.next + i) for i in range(len(entries))]
        return QuantizedLinear(tensor.format, *held)

    def write(self, parts: tuple[Tensor, ...]) -> None:
        for part in parts:
            if self.next >= self.num_entries:
                self.writer.write(part)
            self.next += 1


def _parts(weight: QuantizedLinear) -> tuple[Tensor, ...]:
    parts = (weight.codes, weight.scales)
    return parts if weight.mins is None else (*parts, weight.mins)


def quantize_fused(
    tensor: FusedTensor, checkpoint: Checkpoint, moments: Moments | None
) -> QuantizedLinear:
    """The fused weight in its format, source by source; compensating where there are `moments`."""
    assert tensor.format != "bf16"
    held = [_held(checkpoint, name, tensor.format) for name in tensor.sources]
    factor = None
    if moments is not None and None in held:
        factor = moments.factor()
    parts = []
    for name, part in zip(tensor.sources, held, strict=True):
        if part is not None:
            parts.append(part)
        elif factor is None:
            parts.append(_rounded(checkpoint.load(name), tensor.format))
        else:
            with torch_threads(1):  # input by input: too little work at once to share out
                parts.append(quantize_compensating(checkpoint.load(name), factor, tensor.format))
    return concat_rows(parts)


def _held(checkpoint: Checkpoint, name: str, format: QuantizedFormat) -> QuantizedLinear | None:
    """The source's own codes, if they are of this format."""
    part = checkpoint.codes(name)
    return part if part is not None and part.format == format else None


def _rounded(weight: Tensor, format: QuantizedFormat) -> QuantizedLinear:
    """To the nearest. Rows do not depend on each other, so some at a time."""
    pieces = torch.split(weight, max(1, _PIECE // weight.shape[1]))
    return concat_rows([quantize(piece, format) for piece in pieces])


def _report_errors(
    tensor: FusedTensor,
    checkpoint: Checkpoint,
    weight: QuantizedLinear,
    moments: Moments | None,
    report: GroupReport,
) -> None:
    assert tensor.format != "bf16"
    if all(_held(checkpoint, name, tensor.format) is not None for name in tensor.sources):
        report.num_lossless += 1
        return
    report.num_rounded += 1
    sums: dict[str, float] = {}
    start = 0
    for name in tensor.sources:
        source = checkpoint.load(name)
        for piece in torch.split(source, max(1, _PIECE // weight.k)):
            end = start + piece.shape[0]
            _add_errors(piece.float(), _rows(weight, start, end), moments, sums)
            start = end
    report.relative_errors[tensor.name] = _relative(sums, "error", "size")
    if moments is not None:
        report.output_errors[tensor.name] = {
            "gptq": _relative(sums, "output error", "output size"),
            "rtn": _relative(sums, "rtn error", "output size"),
        }


def _add_errors(
    piece: Tensor, weight: QuantizedLinear, moments: Moments | None, sums: dict[str, float]
) -> None:
    error = dequantize(weight) - piece
    found = {"error": _squared(error), "size": _squared(piece)}
    if moments is not None:
        found["output error"] = moments.energy(error)
        found["output size"] = moments.energy(piece)
        found["rtn error"] = moments.energy(dequantize(quantize(piece, weight.format)) - piece)
    for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + value


def _rows(weight: QuantizedLinear, start: int, end: int) -> QuantizedLinear:
    mins = None if weight.mins is None else weight.mins[start:end]
    return QuantizedLinear(weight.format, weight.codes[start:end], weight.scales[start:end], mins)


def _squared(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _relative(sums: dict[str, float], error: str, size: str) -> float:
    return round((sums[error] / sums[size]) ** 0.5, _DIGITS) if sums[size] else 0.0
