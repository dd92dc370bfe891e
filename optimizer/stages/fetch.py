"""Stage 1: the model's files are on this machine and are what the recipe pinned."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.sources import Fetched
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import Manifest, file_sha256

_RESULT = "fetched.json"


@dataclass(frozen=True)
class FetchStage:
    recipe: Recipe
    progress: Progress
    name: str = "fetch"

    @property
    def inputs(self) -> dict[str, Any]:
        source = self.recipe.open_source()
        return {"identity": source.identity(), "sha256": self.recipe.sha256}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Fills `source_sha256` and `revision`. Raises ArtifactError if the pin does not match."""
        folder = work / self.name
        downloads = folder / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        arrived = 0

        def advance(num_bytes: int) -> None:
            nonlocal arrived
            arrived += num_bytes
            self.progress.advance(num_bytes)

        fetched = self.recipe.open_source().fetch(downloads, advance)
        digest = self._digest(fetched, count=arrived == 0)
        if self.recipe.sha256 not in (None, digest):
            shutil.rmtree(downloads)
            raise ArtifactError(
                f"{manifest.source} has sha256 {digest}, the recipe pins {self.recipe.sha256}"
            )
        (folder / _RESULT).write_text(json.dumps({"path": str(fetched.path)}))
        return replace(manifest, source_sha256=digest, revision=fetched.revision)

    def _digest(self, fetched: Fetched, count: bool) -> str:
        """sha256 of a single file; of the JSON of names and hashes for a folder."""
        if count:
            self.progress.expect(sum(path.stat().st_size for path in fetched.files))
        hashes = {}
        for path in fetched.files:
            hashes[path.name] = file_sha256(path)
            if count:
                self.progress.advance(path.stat().st_size)
        if fetched.path.is_file():
            return hashes[fetched.path.name]
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def fetched_path(work: Path) -> Path:
    """The model folder or .gguf file that the stage left."""
    path = Path(json.loads((work / "fetch" / _RESULT).read_text())["path"])
    if not path.exists():
        raise ArtifactError(f"{path} is gone since it was fetched")
    return path
