"""A folder of artifacts: names, the index from recipe to artifact, locks, work folders, links.

store/
  <model>-<artifact id>/   artifacts, each complete from the moment it appears
  <model>                  link to the one staged last
  .index/<key>.json        which artifact a recipe became, and of which local files
  .work/<key>/             stages of a run that has not finished
  .locks/<key>.lock        held while a recipe is being staged
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import verify_artifact


@dataclass(frozen=True)
class Store:
    root: Path
    """Absolute."""

    def artifact(self, model: str, artifact_id: str) -> Path:
        return self.root / f"{model}-{artifact_id}"

    def find(self, key: str, identity: list[str] | None) -> Path | None:
        """The artifact that a recipe became, if its local source is still as it was.

        Raises ArtifactError if that artifact has been altered: it is not replaced in silence.
        """
        try:
            entry = json.loads((self.root / ".index" / f"{key}.json").read_text())
            directory: Path = self.root / entry["artifact"]
            if entry["identity"] != identity or not directory.exists():
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:
            verify_artifact(directory)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; delete {directory} to stage the model again") from error
        return directory

    def remember(self, key: str, identity: list[str] | None, directory: Path) -> None:
        entry = {"artifact": directory.name, "identity": identity}
        path = self.root / ".index" / f"{key}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(entry))

    def point(self, model: str, directory: Path) -> None:
        """Turn the model's link to `directory`; readers see the old or the new one, never none."""
        link = self.root / model
        if link.is_symlink() and os.readlink(link) == directory.name:
            return
        if link.exists() and not link.is_symlink():
            raise ArtifactError(f"{link} is in the way: the store keeps a link of this name")
        fresh = self.root / f".{model}.{os.getpid()}.link"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(directory.name, target_is_directory=True)
        fresh.replace(link)
        self.sync()

    def work(self, key: str) -> Path:
        path = self.root / ".work" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def has_work(self, key: str) -> bool:
        return (self.root / ".work" / key).exists()

    def discard_work(self, key: str) -> None:
        shutil.rmtree(self.root / ".work" / key, ignore_errors=True)

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """One process a recipe at a time; the system frees it when its holder dies."""
        folder = self.root / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot write to the store {self.root}: {error}") from error
        lock = FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def sync(self) -> None:
        sync_path(self.root)


def write_atomically(path: Path, text: str) -> None:
    """Under its name there is the old text or the new one, also after a power cut."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_file(source: Path, target: Path) -> None:
    """The same bytes under another name; file systems without hard links get a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
