"""Stage 4: weights as the CPU kernels read them: a replica maps the file and copies nothing.

The same bytes for every instruction set and thread count, so the artifact serves any machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.store import link_file, sync_path
from optimizer.tensor_file import Entry, write_tensors
from torchweave_ray.models.artifact import WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig, read_hf_config
from torchweave_ray.models.mapped_file import cache_in_huge_pages
from torchweave_ray.models.weights import PACKED, FusedTensor, fused_tensors, stored_order


@dataclass(frozen=True)
class PackStage:
    recipe: Recipe
    progress: Progress
    name: str = "pack"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"asked": self.recipe.layout, "layout": PACKED}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Sets `layout` where the weights are bfloat16 and the recipe leaves it to us."""
        source, folder = work / "fuse", work / self.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in source.glob("*.json"):
            link_file(path, folder / path.name)
        size = (source / WEIGHTS).stat().st_size
        self.progress.expect(size)
        if self.recipe.layout == "fused" or manifest.dtype != "bfloat16":
            link_file(source / WEIGHTS, folder / WEIGHTS)
            self.progress.advance(size)
            return manifest
        tensors = stored_order(fused_tensors(ModelConfig.from_hf(read_hf_config(source))), PACKED)
        write_tensors(
            folder / WEIGHTS,
            manifest.dtype,
            [Entry(tensor.name, tensor.stored_shape(PACKED)) for tensor in tensors],
            _packed(source / WEIGHTS, tensors),
            self.progress.advance,
        )
        sync_path(folder / WEIGHTS)
        cache_in_huge_pages(folder / WEIGHTS)
        return replace(manifest, layout=PACKED)


def _packed(path: Path, tensors: Sequence[FusedTensor]) -> Iterator[Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for tensor in tensors:
            yield tensor.pack(file.get_tensor(tensor.name))
