"""Every file hashed, the artifact's id, its manifest: the folder is a whole artifact."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimizer.progress import Progress
from optimizer.store import link_file
from torchweave_ray.models.artifact import (
    MANIFEST,
    FileEntry,
    Manifest,
    compute_artifact_id,
    file_sha256,
    seal,
)


@dataclass(frozen=True)
class SealStage:
    progress: Progress
    name: str = "seal"

    @property
    def inputs(self) -> dict[str, Any]:
        return {}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Fills `files` and `artifact_id`."""
        folder = work / self.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        paths = sorted(path for path in (work / "pack").iterdir() if path.is_file())
        self.progress.expect(sum(path.stat().st_size for path in paths))
        files = {}
        for path in paths:
            copy = folder / path.name
            link_file(path, copy)
            size = copy.stat().st_size
            files[path.name] = FileEntry(file_sha256(copy), size)
            self.progress.advance(size)
        artifact_id = compute_artifact_id(manifest.source_sha256, manifest.recipe, files)
        sealed = replace(manifest, files=files, artifact_id=artifact_id)
        (folder / MANIFEST).write_text(sealed.to_json())
        seal(folder, sealed)
        return sealed
