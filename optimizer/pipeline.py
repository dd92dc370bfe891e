"""From recipe to artifact: the `Stage` protocol, runs that resume, and `optimize`, the front door.

A stage writes below `work/<its name>` only. When it is done a marker with a hash of its inputs is
written beside, so a run that was killed goes on with the first stage that is not done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from optimizer.progress import Progress, SilentProgress
from optimizer.recipe import Recipe, resolve_recipe
from optimizer.remote_store import open_places
from optimizer.store import Store, sync_path, write_atomically
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import FORMAT_VERSION, REPORT, Manifest, write_report

STAGES_VERSION = 3
"""Raise when a stage gives other bytes for the same source: what is staged is then staged anew."""


class Stage(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the stage's result besides the manifest before it; plain JSON."""
        ...

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Read earlier stages' folders, write `work / name`, return the manifest with more in it.

        May find what a killed run left there, and must give the same bytes then.
        """
        ...


@dataclass(frozen=True, slots=True)
class StageReport:
    name: str
    seconds: float
    num_bytes: int
    """Fetched, written or hashed: what the stage's progress counts."""
    resumed: bool


def optimize(
    recipe: str | Path | Recipe,
    store: str | Path | None = None,
    progress: Progress | None = None,
    cache: str | Path | None = None,
) -> Path:
    """Stage a model and return its artifact's folder; at once if the store holds it already.

    `recipe`: whatever `resolve_recipe` takes. `store`, `cache`: as of `open_places`; with storage
    behind the store on this node, what is there is fetched, and what is staged goes there.
    Safe to call from many processes: one stages, the others wait. Raises ConfigError for a bad
    recipe, ArtifactError for what cannot be fetched, converted or written.
    """
    recipe = resolve_recipe(recipe)
    progress = progress or SilentProgress()
    shelf, remote = open_places(store, cache)
    key = _key(recipe)
    found = find_staged(recipe, shelf)
    if found is not None and not shelf.has_work(key):  # else a run died while it cleaned up
        _point(shelf, recipe, found)
        if remote is not None:
            remote.publish(key, recipe.identity(), found, progress)
        return found
    with shelf.lock(key, lambda: progress.wait(recipe.name)):
        if (found := find_staged(recipe, shelf)) is not None:
            shelf.discard_work(key)
            return found  # staged while this process waited
        identity = recipe.identity()
        try:
            if remote is not None and (name := remote.find(key, identity)) is not None:
                directory = remote.fetch(name, shelf, progress)
                _point(shelf, recipe, directory)
            else:
                directory = _stage(recipe, shelf, shelf.work(key), progress)
                if remote is not None:
                    remote.publish(key, identity, directory, progress)
            shelf.remember(key, identity, directory)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise ArtifactError(
                f"staging {recipe.name} failed: {error.strerror or error}{where}; what the store "
                "held before is unchanged, and the next run goes on from here"
            ) from error
        shelf.discard_work(key)
        return directory


def find_staged(recipe: Recipe, store: Store) -> Path | None:
    """The recipe's artifact if it has been staged; a few stat calls, no lock."""
    return store.find(_key(recipe), recipe.identity())


def run_stages(
    stages: Sequence[Stage], work: Path, manifest: Manifest, progress: Progress
) -> tuple[Manifest, list[StageReport]]:
    """Run what a killed run has not done yet. Every stage's files are on disk before the next."""
    reports = []
    for stage in stages:
        inputs = _hash([STAGES_VERSION, stage.name, stage.inputs, dataclasses.asdict(manifest)])
        marker = work / f"{stage.name}.done.json"
        done = _read_marker(marker, inputs, work / stage.name)
        if done is None:
            marker.unlink(missing_ok=True)
            done = _run_stage(stage, work, manifest, progress)
            write_atomically(marker, json.dumps(_marker(inputs, done, work / stage.name)))
        manifest, report = done
        progress.finish(report.name, report.seconds, report.resumed)
        reports.append(report)
    return manifest, reports


def _stage(recipe: Recipe, store: Store, work: Path, progress: Progress) -> Path:
    # Imported here: they load torch, and a recipe that is staged already needs none of it.
    from optimizer.stages.convert import ConvertStage
    from optimizer.stages.fetch import FetchStage
    from optimizer.stages.fuse import FuseStage
    from optimizer.stages.pack import PackStage
    from optimizer.stages.publish import PublishStage
    from optimizer.stages.quantize import QuantizeStage
    from optimizer.stages.seal import SealStage
    from optimizer.stages.tune import TuneStage
    from optimizer.stages.verify import VerifyStage

    counting = _CountingProgress(progress)
    draft = Manifest(
        artifact_id="",
        source=recipe.open_source().text,
        source_sha256="",
        architecture="",
        dtype="",
        layout="",
        files={},
    )
    stages: list[Stage] = [
        FetchStage(recipe, counting),
        ConvertStage(recipe, counting),
        FuseStage(counting),
        QuantizeStage(recipe, counting),
        PackStage(recipe, counting),
        VerifyStage(recipe, counting),
        TuneStage(recipe, counting),
        SealStage(counting),
    ]
    manifest, reports = run_stages(stages, work, draft, counting)
    write_report(work / "seal", _report(recipe, reports, work))
    run_stages([PublishStage(store, recipe.name, counting)], work, manifest, counting)
    return store.artifact(recipe.name, manifest.artifact_id)


def _run_stage(
    stage: Stage, work: Path, manifest: Manifest, progress: Progress
) -> tuple[Manifest, StageReport]:
    started = time.perf_counter()
    progress.start(stage.name)
    manifest = stage.run(work, manifest)
    folder = work / stage.name
    for path in [*folder.rglob("*"), folder] if folder.exists() else []:
        sync_path(path)
    num_bytes = progress.num_bytes if isinstance(progress, _CountingProgress) else 0
    seconds = round(time.perf_counter() - started, 3)
    return manifest, StageReport(stage.name, seconds, num_bytes, resumed=False)


def _marker(inputs: str, done: tuple[Manifest, StageReport], folder: Path) -> dict[str, Any]:
    manifest, report = done
    return {
        "inputs": inputs,
        "outputs": _sizes(folder),
        "manifest": manifest.to_json(),
        "seconds": report.seconds,
        "num_bytes": report.num_bytes,
    }


def _read_marker(path: Path, inputs: str, folder: Path) -> tuple[Manifest, StageReport] | None:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if raw["inputs"] != inputs or raw["outputs"] != _sizes(folder):
        return None
    report = StageReport(folder.name, raw["seconds"], raw["num_bytes"], resumed=True)
    return Manifest.from_json(raw["manifest"], str(path)), report


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): p.stat().st_size for p in files if p.name != REPORT}


def _report(recipe: Recipe, reports: Sequence[StageReport], work: Path) -> dict[str, Any]:
    return {
        "recipe": recipe.public(),
        "source": json.loads((work / "fetch" / "fetched.json").read_text())["report"],
        "stages": [dataclasses.asdict(report) for report in reports],
        "quantization": json.loads((work / "quantize" / "quantization.json").read_text()),
        "quality": json.loads((work / "verify" / "quality.json").read_text()),
        "speed": json.loads((work / "verify" / "speed.json").read_text()),
        "tuning": json.loads((work / "tune" / "tuning.json").read_text()),
    }


def _point(store: Store, recipe: Recipe, directory: Path) -> None:
    try:
        store.point(recipe.name, directory)
    except OSError:
        return  # a store that we may only read: its owner keeps the link


def _key(recipe: Recipe) -> str:
    return _hash([FORMAT_VERSION, STAGES_VERSION, recipe.key()])[:32]


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class _CountingProgress:
    """Passes everything on and keeps the running stage's bytes for the report."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.num_bytes = 0

    def start(self, stage: str) -> None:
        self.num_bytes = 0
        self._inner.start(stage)

    def expect(self, num_bytes: int) -> None:
        self._inner.expect(num_bytes)

    def advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._inner.advance(num_bytes)

    def finish(self, stage: str, seconds: float, resumed: bool) -> None:
        self._inner.finish(stage, seconds, resumed)

    def wait(self, recipe: str) -> None:
        self._inner.wait(recipe)
