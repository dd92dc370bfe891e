"""Stage 3: q, k, v as one tensor and gate, up as one, under the artifact's names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from optimizer.progress import Progress
from optimizer.tensor_file import DTYPES, write_tensors
from torchweave_ray.models.artifact import WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig, read_hf_config
from torchweave_ray.models.tensors import LAYOUT, FusedTensor, StoredTensor, fused_tensors


@dataclass(frozen=True)
class FuseStage:
    progress: Progress
    name: str = "fuse"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"layout": LAYOUT}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Fills `layout`. Rows follow one another, so sources are copied one by one."""
        source, folder = work / "convert", work / self.name
        folder.mkdir(exist_ok=True)
        for path in source.glob("*.json"):
            shutil.copyfile(path, folder / path.name)
        fused = fused_tensors(ModelConfig.from_hf(read_hf_config(source)))
        dtype = DTYPES[manifest.dtype]
        entries = [StoredTensor(tensor.name, tensor.shape, dtype) for tensor in fused]
        self.progress.expect((source / WEIGHTS).stat().st_size)
        write_tensors(
            folder / WEIGHTS,
            entries,
            _parts(source / WEIGHTS, fused),
            self.progress.advance,
        )
        return replace(manifest, layout=LAYOUT)


def _parts(path: Path, fused: Sequence[FusedTensor]) -> Iterator[Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for tensor in fused:
            for name in tensor.sources:
                yield file.get_tensor(name)
