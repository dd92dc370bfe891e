"""Stage 3: q, k, v as one tensor and gate, up as one, under the artifact's names."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from optimizer.progress import Progress
from optimizer.tensor_file import DTYPES, TensorWriter
from torchweave_ray.models.artifact import WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import LAYOUT, StoredTensor, fused_tensors


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
        fused = fused_tensors(ModelConfig.read(source))
        dtype = DTYPES[manifest.dtype]
        entries = [StoredTensor(tensor.name, tensor.shape, dtype) for tensor in fused]
        self.progress.expect((source / WEIGHTS).stat().st_size)
        key = json.dumps([manifest.source_sha256, manifest.recipe], sort_keys=True)
        with TensorWriter(folder / WEIGHTS, entries, self.progress.advance, key) as writer:
            for tensor in fused[writer.num_done :]:
                # Opened for each: pages of a mapping stay in memory as long as it is there.
                with safe_open(source / WEIGHTS, framework="pt", device="cpu") as file:
                    for name in tensor.sources:
                        writer.write(file.get_tensor(name))
        return replace(manifest, layout=LAYOUT)
