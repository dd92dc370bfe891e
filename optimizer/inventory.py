"""What a store holds, which of it nobody needs any more, and getting rid of that.

Deleting is crash-safe: an artifact leaves its name by one rename, under a lock that whoever maps it
shares. What a killed deletion left in `.trash` goes with the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from optimizer.store import Store
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.models.artifact import MANIFEST, claim_artifact

TRASH = ".trash"
_NAME = re.compile(r"(?P<model>.+)-(?P<id>[0-9a-f]{24})")


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact of a store."""

    directory: Path
    model: str
    artifact_id: str
    num_bytes: int
    published_at: float
    """Unix time; of the report's renewal where the same artifact was staged again."""
    links: tuple[str, ...]
    """Of the store, to it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an artifact, or would."""

    entry: Entry
    deleted: bool
    why: str
    """It was kept, or deleted."""


def list_artifacts(store: Store) -> list[Entry]:
    """By model, the one published last first. Folders that are no artifacts are none of ours."""
    links: dict[str, list[str]] = {}
    entries = []
    for path in _folder(store.root):
        if path.is_symlink():
            links.setdefault(Path(os.readlink(path)).name, []).append(path.name)
        elif (found := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file():
            num_bytes = sum(p.stat().st_size for p in path.iterdir() if p.is_file())
            modified = path.stat().st_mtime
            entries.append(Entry(path, found["model"], found["id"], num_bytes, modified, ()))
    with_links = [replace(e, links=tuple(links.get(e.directory.name, ()))) for e in entries]
    return sorted(with_links, key=lambda e: (e.model, -e.published_at, e.artifact_id))


def find_artifact(store: Store, reference: str) -> Path:
    """A folder, or of the store a model's name, an artifact's name or the beginning of its id.

    Raises ArtifactError naming what there is.
    """
    for path in (Path(reference).expanduser(), store.root / reference):
        if (path / MANIFEST).is_file():
            return path.resolve()
    entries = list_artifacts(store)
    found = [e.directory for e in entries if reference and e.artifact_id.startswith(reference)]
    if len(found) == 1:
        return found[0]
    held = ", ".join(e.directory.name for e in entries) or "nothing"
    several = "several artifacts begin with" if found else "no artifact is called"
    raise ArtifactError(f"{several} {reference!r}; {store.root} holds {held}")


def collect(store: Store, keep: int, dry_run: bool = False) -> list[Verdict]:
    """Delete all but the `keep` newest artifacts of each model, never one that is in use: mapped by
    a live process, or what a link of the store points to.

    Raises ArtifactError where the file system cannot tell what is in use.
    """
    if keep < 0:
        raise ConfigError(f"keep must be 0 or more, got {keep}")
    if not dry_run:
        shutil.rmtree(store.root / TRASH, ignore_errors=True)
    seen: Counter[str] = Counter()
    verdicts = []
    for entry in list_artifacts(store):
        seen[entry.model] += 1
        if seen[entry.model] <= keep:
            verdicts.append(Verdict(entry, False, f"one of the newest {keep} of {entry.model}"))
        elif entry.links:
            verdicts.append(Verdict(entry, False, f"link {entry.links[0]} points to it"))
        else:
            verdicts.append(_delete(store, entry, dry_run))
    if not dry_run:
        shutil.rmtree(store.root / TRASH, ignore_errors=True)
        _forget(store)
    return verdicts


def discard_unfinished(store: Store, dry_run: bool = False) -> list[tuple[str, int]]:
    """(key, bytes) of killed runs that no process goes on with, and which are now gone."""
    found = []
    for folder in _folder(store.root / ".work"):
        try:
            with FileLock(store.root / ".locks" / f"{folder.name}.lock", timeout=0):
                files = [path for path in folder.rglob("*") if path.is_file()]
                found.append((folder.name, sum(path.stat().st_size for path in files)))
                if not dry_run:
                    store.discard_work(folder.name)
        except Timeout:
            continue
    return found


def _delete(store: Store, entry: Entry, dry_run: bool) -> Verdict:
    try:
        claim = claim_artifact(entry.directory)
    except OSError as error:
        raise ArtifactError(
            f"cannot tell whether {entry.directory} is in use ({error.strerror or error}); nothing "
            "was deleted"
        ) from error
    if claim is None:
        return Verdict(entry, False, "a process uses it")
    try:
        if not dry_run:
            trash = store.root / TRASH
            trash.mkdir(exist_ok=True)
            entry.directory.rename(trash / f"{entry.directory.name}.{os.getpid()}")
            store.sync()
    finally:
        claim.release()
    return Verdict(entry, True, "older, and in no use")


def _forget(store: Store) -> None:
    """Entries of the index whose artifact is gone: their recipes are staged anew."""
    for path in _folder(store.root / ".index"):
        try:
            artifact = json.loads(path.read_text())["artifact"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not (store.root / artifact).exists():
            path.unlink(missing_ok=True)


def _folder(path: Path) -> Iterator[Path]:
    return iter(sorted(path.iterdir()) if path.is_dir() else ())
