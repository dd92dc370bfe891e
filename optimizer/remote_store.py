"""Artifacts on shared storage behind a URL that fsspec knows (s3://, gs://, file://, ...).

    <url>/<model>-<artifact id>/   its files, manifest.json last: what has one is whole
    <url>/.index/<key>.json        which artifact a recipe became

Nodes keep what they fetch in a store of their own. Credentials are the environment's.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.progress import Progress
from optimizer.sources.fsspec_files import FsspecFiles
from optimizer.sources.redaction import public_url, scrub
from optimizer.sources.remote_files import RemoteFile
from optimizer.store import Store, sync_path
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import MANIFEST, REPORT, SEAL, Manifest, verify_artifact

_ATOMIC_PUTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2"}
"""An object appears there whole or not at all; elsewhere a file is written aside and renamed."""
_TRIES = 2
"""To fetch: another cluster may just be renewing the report."""


@dataclass(frozen=True)
class RemoteStore:
    url: str = field(repr=False)
    """With what it may be signed with: only requests see it."""

    def find(self, key: str, identity: list[str] | None) -> str | None:
        """The name of the artifact that a recipe became, of the same local source."""
        try:
            entry = json.loads(self._read(f".index/{key}.json") or b"{}")
        except ValueError:
            return None
        whole = isinstance(entry, dict) and entry.get("identity") == identity
        name = entry.get("artifact") if whole else None
        return name if isinstance(name, str) and self._read(f"{name}/{MANIFEST}") else None

    def publish(
        self, key: str, identity: list[str] | None, directory: Path, progress: Progress
    ) -> None:
        """Upload an artifact, its manifest last, then say which recipe it is of. What is there
        already stays. Raises ArtifactError."""
        name = directory.name
        if self._read(f"{name}/{MANIFEST}") != (directory / MANIFEST).read_bytes():
            manifest = verify_artifact(directory)
            report = [REPORT] if (directory / REPORT).is_file() else []
            files = [directory / file for file in (*manifest.files, *report, MANIFEST)]
            progress.start("upload")
            progress.expect(sum(path.stat().st_size for path in files))
            for path in files:
                self._write(f"{name}/{path.name}", path)
                progress.advance(path.stat().st_size)
        entry = json.dumps({"artifact": name, "identity": identity}).encode()
        if self._read(f".index/{key}.json") != entry:
            self._write(f".index/{key}.json", entry)

    def fetch(self, name: str, store: Store, progress: Progress) -> Path:
        """This node's copy, checked whole when it came. One process of a node fetches it, the
        others wait; one that was killed is continued. Raises ArtifactError."""
        target = store.root / name
        key = f"fetch-{name}"
        with store.lock(key, lambda: progress.wait(name)):
            if target.exists():
                verify_artifact(target)
                return target
            for attempt in range(_TRIES):
                folder = store.work(key) / "artifact"
                with self._explained("fetch", name):
                    manifest = self._download(name, folder, progress)
                try:
                    verify_artifact(folder, full=True)
                    break
                except ArtifactError as error:
                    store.discard_work(key)
                    if attempt + 1 == _TRIES:
                        place = public_url(self.url)
                        raise ArtifactError(f"{name} came damaged from {place}: {error}") from error
            for path in folder.iterdir():
                if path.name in (*manifest.files, MANIFEST, REPORT, SEAL):
                    sync_path(path)
                else:
                    path.unlink()  # what the download kept, to be continued
            folder.rename(target)
            store.sync()
            store.discard_work(key)
        return target

    def _download(self, name: str, folder: Path, progress: Progress) -> Manifest:
        from optimizer.sources.download import download

        text = self._read(f"{name}/{MANIFEST}")
        if text is None:
            raise ArtifactError(f"no artifact at {public_url(self.url)}/{name}: it has no manifest")
        manifest = Manifest.from_json(text.decode(errors="replace"), f"{name}/{MANIFEST}")
        files = FsspecFiles(f"{self.url.rstrip('/')}/{name}")
        progress.start("download")
        wanted: list[RemoteFile] = [files.stat(file) for file in manifest.files]
        with suppress(FileNotFoundError):
            wanted.append(files.stat(REPORT))
        download(files, wanted, folder, progress)
        (folder / MANIFEST).write_bytes(text)
        return manifest

    def _read(self, name: str) -> bytes | None:
        """A small file, None where there is none."""
        with self._explained("read", name):
            files, path = self._at(name)
            try:
                return bytes(files.cat_file(path))
            except FileNotFoundError:
                return None

    def _write(self, name: str, content: Path | bytes) -> None:
        with self._explained("write", name):
            files, path = self._at(name)
            said = files.protocol
            protocols = {said} if isinstance(said, str) else set(said)
            part = path if protocols & _ATOMIC_PUTS else f"{path}.{uuid.uuid4().hex}.part"
            files.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(content, bytes):
                files.pipe_file(part, content)
            else:
                files.put_file(str(content), part)
            if part != path:
                files.mv(part, path)

    def _at(self, name: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(self.url, use_listings_cache=False)
        return files, f"{root.rstrip('/')}/{name}"

    @contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except ArtifactError:
            raise
        except Exception as error:  # each driver raises its own
            said = scrub(f"{type(error).__name__}: {error}", self.url)
            place = public_url(self.url).rstrip("/")
            raise ArtifactError(f"cannot {verb} {place}/{name}: {said}") from None


def open_places(
    store: str | Path | None, cache: str | Path | None
) -> tuple[Store, RemoteStore | None]:
    """The store on this node, and the shared one behind it if there is one.

    `store`: a folder or a URL; by default ARTIFACT_DIR, or ./artifacts. With a `cache`, by default
    ARTIFACT_CACHE_DIR, a folder is shared storage too, and this node's copies are there; a URL's
    are in ~/.cache/torchweave/artifacts unless it says otherwise.
    """
    chosen = str(store or os.environ.get("ARTIFACT_DIR") or "artifacts")
    local = cache or os.environ.get("ARTIFACT_CACHE_DIR")
    if is_url(chosen):
        return Store(_folder(local or "~/.cache/torchweave/artifacts")), RemoteStore(chosen)
    if not local:
        return Store(_folder(chosen)), None
    return Store(_folder(local)), RemoteStore(f"file://{_folder(chosen)}")


def fetch_artifact(url: str, cache: str | Path | None, progress: Progress) -> Path:
    """An artifact's folder behind a URL, as this node's copy."""
    parent, _, name = url.rstrip("/").rpartition("/")
    store, remote = open_places(parent, cache)
    assert remote is not None
    return remote.fetch(name, store, progress)


def is_url(text: str) -> bool:
    return "://" in text


def _folder(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()
