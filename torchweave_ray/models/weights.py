"""Reads an artifact's weights: as they are stored, mapped, or row-major in a dtype.

Which tensors a file must hold, and how, is tensors.py's. Knows nothing of ops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.packing import PackedLinear, unpack_linear, unpack_quantized
from torchweave_ray.kernels.quantization import QuantizedLinear, dequantize
from torchweave_ray.models.artifact import WEIGHTS, Manifest, read_manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.mapped_file import map_file, tensors_in
from torchweave_ray.models.tensors import (
    LAYOUT,
    PACKED,
    QUANTIZED,
    QUANTIZED_ROWS,
    FusedTensor,
    StoredTensor,
    check_shape,
    fused_tensors,
)
from torchweave_ray.models.upload import Uploader

LAYOUTS = (LAYOUT, PACKED, QUANTIZED, QUANTIZED_ROWS)

Part = Callable[[FusedTensor, Tensor | QuantizedLinear], Tensor | QuantizedLinear]
"""What is kept of a row-major tensor."""

_logger = logging.getLogger(__name__)


def _all_of_it(tensor: FusedTensor, whole: Tensor | QuantizedLinear) -> Tensor | QuantizedLinear:
    return whole


def load_weights(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    manifest: Manifest | None = None,
    whole: Tensor | None = None,
    part: Part = _all_of_it,
) -> dict[str, Tensor]:
    """An artifact's tensors by name, row-major. On the CPU in their own dtype they are views of
    the mapped file, shared by all replicas of a node through the page cache; packed ones are
    unpacked and quantised ones dequantised, which takes a copy. `manifest`: of a folder
    that has none yet. `whole`: [bytes] uint8, the weights file where it is no file of the folder.
    `part`: a rank's, of each tensor.

    Raises ArtifactError naming the tensor that is missing, unknown or of another shape.
    """
    uploader = Uploader(device)
    tensors: dict[str, Tensor] = {}
    num_unpacked = num_dequantised = 0
    for tensor, stored in _read(directory, config, manifest, whole):
        held = part(tensor, _row_major(stored))
        num_unpacked += isinstance(stored, PackedLinear) or tensor.format != "bf16"
        if isinstance(held, QuantizedLinear):
            held = dequantize(held)
        num_dequantised += tensor.format != "bf16"
        tensors[tensor.name] = uploader.move(held, dtype)
    uploader.finish()
    if num_unpacked:
        _logger.info(
            "[Weights] unpacked %d tensors of %s%s",
            num_unpacked,
            directory,
            f", {num_dequantised} of them dequantised to {dtype}" if num_dequantised else "",
        )
    return tensors


def load_products(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    manifest: Manifest | None = None,
    whole: Tensor | None = None,
    part: Part = _all_of_it,
) -> dict[str, Tensor | QuantizedLinear]:
    """As `load_weights`, for products that read codes: quantised weights stay so, those of experts
    left out. Raises as `load_weights`."""
    uploader = Uploader(device)
    tensors: dict[str, Tensor | QuantizedLinear] = {}
    for tensor, stored in _read(directory, config, manifest, whole):
        held = part(tensor, _row_major(stored))
        if isinstance(held, QuantizedLinear) and tensor.num_experts > 1:
            held = dequantize(held)
        if isinstance(held, QuantizedLinear):
            parts = [held.codes, held.scales, *([] if held.mins is None else [held.mins])]
            moved = [uploader.move(part) for part in parts]
            tensors[tensor.name] = QuantizedLinear(held.format, *moved)
        else:
            tensors[tensor.name] = uploader.move(held, dtype)
    uploader.finish()
    return tensors


def _row_major(stored: Tensor | PackedLinear | QuantizedLinear) -> Tensor | QuantizedLinear:
    if not isinstance(stored, PackedLinear):
        return stored
    return unpack_linear(stored) if stored.format == "bf16" else unpack_quantized(stored)


def map_packed(
    directory: Path,
    config: ModelConfig,
    manifest: Manifest | None = None,
    whole: Tensor | None = None,
) -> Mapping[str, Tensor | PackedLinear]:
    """The tensors of a CPU artifact as they are stored, all views of the mapped file: packed where
    its layout is PACKED or QUANTIZED. Raises as `load_weights`."""
    found = {}
    for tensor, stored in _read(directory, config, manifest, whole):
        assert not isinstance(stored, QuantizedLinear), "its layout is not of the CPU kernels"
        found[tensor.name] = stored
    return found


def check_weights(directory: Path, manifest: Manifest) -> None:
    """Raises ArtifactError unless this build reads the layout, and every tensor is as it says."""
    config = ModelConfig.read(directory)
    for _ in _read(directory, config, manifest, None):
        pass


def _read(
    directory: Path, config: ModelConfig, manifest: Manifest | None, whole: Tensor | None
) -> Iterator[tuple[FusedTensor, Tensor | PackedLinear | QuantizedLinear]]:
    manifest = manifest or read_manifest(directory)
    layout = manifest.layout
    is_quantized = layout in (QUANTIZED, QUANTIZED_ROWS)
    if layout not in LAYOUTS or is_quantized is not bool(manifest.quantization):
        raise ArtifactError(
            f"{directory}: layout {layout!r} with quantization {manifest.quantization or 'none'} "
            f"is not one that this build reads ({LAYOUT!r} and {PACKED!r} without, {QUANTIZED!r} "
            f"and {QUANTIZED_ROWS!r} with one); stage the model again with `torchweave optimize`"
        )
    tensors = fused_tensors(config, manifest.quantization)
    expected = {tensor.name: tensor.stored(layout, torch.bfloat16) for tensor in tensors}
    path = directory / WEIGHTS
    found = tensors_in(map_file(path) if whole is None else whole, str(path))
    _check_names(path, set(found), {entry.name for held in expected.values() for entry in held})
    for tensor in tensors:
        parts = []
        for entry in expected[tensor.name]:
            part = found[entry.name]
            check_shape(f"{path}: {entry.name}", tuple(part.shape), entry.shape)
            _check_dtype(path, entry, part)
            parts.append(part)
        if layout == QUANTIZED_ROWS:
            format = tensor.format
            yield tensor, parts[0] if format == "bf16" else QuantizedLinear(format, *parts)
        else:
            yield tensor, parts[0] if layout == LAYOUT else tensor.packed(parts)


def _check_names(path: Path, present: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - present):
        raise ArtifactError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if surplus := sorted(present - wanted):
        raise ArtifactError(f"{path}: tensor {surplus[0]} is unknown ({len(surplus)} in all)")


def _check_dtype(path: Path, entry: StoredTensor, found: Tensor) -> None:
    """Codes and scales are of one dtype only, other weights may be any floats."""
    exact = entry.dtype != torch.bfloat16
    if found.dtype != entry.dtype and (exact or not found.is_floating_point()):
        kind = str(entry.dtype) if exact else "floats"
        raise ArtifactError(f"{path}: tensor {entry.name} holds {found.dtype}, not {kind}")
