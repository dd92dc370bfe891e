"""Last stage: the sealed folder appears in the store by one rename, then the model's link turns."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.progress import Progress
from optimizer.store import Store
from torchweave_ray.models.artifact import REPORT, Manifest, verify_artifact


@dataclass(frozen=True)
class PublishStage:
    store: Store
    model: str
    progress: Progress
    name: str = "publish"

    @property
    def inputs(self) -> dict[str, Any]:
        return {}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """An artifact of this id that is there already is kept if it is whole, else refused; it
        gets the newer report."""
        sealed = work / "seal"
        target = self.store.artifact(self.model, manifest.artifact_id)
        try:
            sealed.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            verify_artifact(target, full=True)
            (sealed / REPORT).replace(target / REPORT)
            shutil.rmtree(sealed)
        self.store.sync()
        self.store.point(self.model, target)
        return manifest
