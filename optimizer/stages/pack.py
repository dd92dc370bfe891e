"""Stage 5: weights as the CPU kernels read them: a replica maps the file and copies nothing. As
they are for GPUs.

The same bytes for every instruction set and thread count, so the artifact serves any machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.store import link_file, sync_path
from optimizer.target import is_gpu
from optimizer.tensor_file import DTYPES, write_tensors
from torchweave_ray.models.artifact import WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.mapped_file import cache_in_huge_pages
from torchweave_ray.models.tensors import (
    PACKED,
    QUANTIZED,
    QUANTIZED_ROWS,
    FusedTensor,
    fused_tensors,
    stored_order,
)


@dataclass(frozen=True)
class PackStage:
    recipe: Recipe
    progress: Progress
    name: str = "pack"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"asked": self._asked, "layouts": [PACKED, QUANTIZED]}

    @property
    def _asked(self) -> str:
        """GPUs read rows, quantised or not."""
        return "fused" if is_gpu(self.recipe.target) else self.recipe.layout

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Sets `layout` where the weights are bfloat16 and the recipe leaves it to us."""
        documents, weights, folder = work / "fuse", work / "quantize" / WEIGHTS, work / self.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in documents.glob("*.json"):
            link_file(path, folder / path.name)
        size = weights.stat().st_size
        self.progress.expect(size)
        if self._asked == "fused" or manifest.dtype != "bfloat16":
            link_file(weights, folder / WEIGHTS)
            self.progress.advance(size)
            return replace(manifest, layout=QUANTIZED_ROWS) if manifest.quantization else manifest
        layout = QUANTIZED if manifest.quantization else PACKED
        config = ModelConfig.read(documents)
        tensors = stored_order(fused_tensors(config, manifest.quantization), layout)
        dtype = DTYPES[manifest.dtype]
        write_tensors(
            folder / WEIGHTS,
            [entry for tensor in tensors for entry in tensor.stored(layout, dtype)],
            _packed(weights, tensors, dtype),
            self.progress.advance,
        )
        sync_path(folder / WEIGHTS)
        cache_in_huge_pages(folder / WEIGHTS)
        return replace(manifest, layout=layout)


def _packed(path: Path, tensors: Sequence[FusedTensor], dtype: torch.dtype) -> Iterator[Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for tensor in tensors:
            yield from tensor.pack([file.get_tensor(e.name) for e in tensor.row_major(dtype)])
