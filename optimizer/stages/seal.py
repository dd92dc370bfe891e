"""Every file hashed, the artifact's id, its manifest: the folder is a whole artifact."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.progress import Progress
from optimizer.store import link_file
from torchweave_ray.models.artifact import Manifest, complete_artifact


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
        for path in paths:
            link_file(path, folder / path.name)
        return complete_artifact(folder, manifest, self.progress.advance)
