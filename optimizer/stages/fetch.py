"""Stage 1: the files of the model and its adapters are here and are what the recipe pinned."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optimizer.adapters import Adapter
from optimizer.checkpoints import Checkpoint, open_checkpoint
from optimizer.checkpoints.lora import MergedCheckpoint
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.sources import Fetched, Source
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import Manifest, file_sha256
from torchweave_ray.models.lora.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraAdapter

RESULT = "fetched.json"
_HASHERS = 4


@dataclass(slots=True)
class _Arrivals:
    """One stage's bytes out of several sources."""

    progress: Progress
    expected: int = 0
    arrived: int = 0

    def expect(self, num_bytes: int) -> None:
        self.expected += num_bytes
        self.progress.expect(self.expected)

    def advance(self, num_bytes: int) -> None:
        self.arrived += num_bytes
        self.progress.advance(num_bytes)


@dataclass(frozen=True, slots=True)
class _Brought:
    path: Path
    sha256: str
    revision: str | None
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """Size and sha256 by name."""


@dataclass(frozen=True)
class FetchStage:
    recipe: Recipe
    progress: Progress
    name: str = "fetch"

    @property
    def inputs(self) -> dict[str, Any]:
        pins = [self.recipe.sha256, *(adapter.sha256 for adapter in self.recipe.adapters)]
        return {"identity": self.recipe.identity(), "sha256": pins}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Fills `source_sha256` and `revision`, and `recipe` with the adapters' hashes. Raises
        ArtifactError if a pin does not match."""
        folder = work / self.name
        arrivals = _Arrivals(self.progress)
        model = _bring(self.recipe.open_source(), folder / "downloads", arrivals, ())
        _check_pin(manifest.source, model, self.recipe.sha256, folder / "downloads")
        adapters = [
            self._bring_adapter(adapter, folder / "adapters" / str(index), arrivals)
            for index, adapter in enumerate(self.recipe.adapters)
        ]
        report = {"files": model.files, "adapters": [brought.files for brought in adapters]}
        result = {
            "path": str(model.path),
            "adapters": [
                {"path": str(brought.path), "scale": adapter.scale}
                for brought, adapter in zip(adapters, self.recipe.adapters, strict=True)
            ],
            "report": report,
        }
        (folder / RESULT).write_text(json.dumps(result))
        manifest = replace(manifest, source_sha256=model.sha256, revision=model.revision)
        if not adapters:
            return manifest
        merged = [
            {"sha256": brought.sha256, "scale": float(adapter.scale)}
            for brought, adapter in zip(adapters, self.recipe.adapters, strict=True)
        ]
        return replace(manifest, recipe=manifest.recipe | {"adapters": merged})

    def _bring_adapter(self, adapter: Adapter, folder: Path, arrivals: _Arrivals) -> _Brought:
        source = adapter.open_source()
        brought = _bring(source, folder, arrivals, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        _check_pin(source.text, brought, adapter.sha256, folder)
        return brought


def _bring(source: Source, folder: Path, arrivals: _Arrivals, only: Sequence[str]) -> _Brought:
    """`only`: names of the files that count; none: all."""
    folder.mkdir(parents=True, exist_ok=True)
    before = arrivals.arrived
    fetched = source.fetch(folder, arrivals)
    files = [path for path in fetched.files if not only or path.name in only]
    count = arrivals.arrived == before  # nothing had to be brought: hashing is what takes time
    entries = _hashed(fetched, files, arrivals if count else None)
    hashes = {name: entry["sha256"] for name, entry in entries.items()}
    if fetched.path.is_file():
        digest = hashes[fetched.path.name]
    else:
        digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return _Brought(fetched.path, digest, fetched.revision, entries)


def _hashed(
    fetched: Fetched, files: Sequence[Path], arrivals: _Arrivals | None
) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file by name; read here, unless it was hashed as it arrived."""
    sizes = {path: path.stat().st_size for path in files}
    if arrivals is not None:
        arrivals.expect(sum(sizes.values()))
    left = [path for path in files if path not in fetched.hashes]
    with ThreadPoolExecutor(_HASHERS) as pool:
        hashes = dict(fetched.hashes)
        for path, digest in zip(left, pool.map(file_sha256, left), strict=True):
            hashes[path] = digest
            if arrivals is not None:
                arrivals.advance(sizes[path])
    return {path.name: {"size": sizes[path], "sha256": hashes[path]} for path in files}


def _check_pin(text: str, brought: _Brought, pin: str | None, folder: Path) -> None:
    if pin in (None, brought.sha256):
        return
    shutil.rmtree(folder, ignore_errors=True)
    raise ArtifactError(f"{text} has sha256 {brought.sha256}, the recipe pins {pin}")


def open_fetched(work: Path) -> Checkpoint:
    """The checkpoint that the stage left, adapters merged into it as it is read."""
    result = json.loads((work / "fetch" / RESULT).read_text())
    checkpoint = open_checkpoint(_still_there(result["path"]))
    adapters = [(LoraAdapter(_still_there(a["path"])), a["scale"]) for a in result["adapters"]]
    return MergedCheckpoint(checkpoint, adapters) if adapters else checkpoint


def _still_there(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise ArtifactError(f"{path} is gone since it was fetched")
    return path
