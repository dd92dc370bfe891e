"""Whether a folder is a whole artifact: every file by hash, or by what the last whole check saw.

Whole hashes are taken when publishing and fetching; a start compares size, mtime and inode with
what was recorded then, so that it reads no weights twice. The small documents are always whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact.manifest import (
    MANIFEST,
    REPORT,
    SEAL,
    FileEntry,
    Manifest,
    check_signed,
    compute_artifact_id,
    file_sha256,
    signed_json,
)

MANIFEST_SCHEMA = Path(__file__).with_name("manifest.schema.json")
"""JSON Schema (2020-12) of manifest.json."""
_SELF = "report_sha256"

logger = logging.getLogger(__name__)


def read_manifest(directory: Path) -> Manifest:
    """Raises ArtifactError saying what is missing or unreadable, or of another id than it says."""
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not a manifest ({error})") from error
    except OSError as error:
        raise ArtifactError(
            f"no artifact in {directory}: {MANIFEST} is missing; "
            "stage a model first with `torchweave optimize`"
        ) from error
    manifest = Manifest.from_json(text, str(path))
    manifest.check_id(str(path))
    return manifest


def verify_artifact(
    directory: Path, full: bool = False, elsewhere: Container[str] = ()
) -> Manifest:
    """Read the manifest and check every file it lists.

    `full` hashes everything, the report too; otherwise a file is trusted when size, mtime and inode
    are those that the last whole check sealed, and hashed when they are not. `elsewhere`: files
    that another place holds, and checks.
    Raises ArtifactError naming the first file that is missing, cut or altered.
    """
    manifest = read_manifest(directory)
    sealed = {} if full else _read_seal(directory)
    fresh = False
    for name, entry in sorted(manifest.files.items()):
        if name in elsewhere:
            continue
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing from artifact {manifest.artifact_id}")
        if path.stat().st_size != entry.size:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry.size}"
            )
        if sealed.get(name) != _identity(path):
            fresh = True
            if file_sha256(path) != entry.sha256:
                raise ArtifactError(f"{path} was altered: its sha256 is not the manifest's")
    if full and manifest.format_version >= 2 and (directory / REPORT).exists():
        _checked_report(directory)
    if fresh and not elsewhere:
        _seal(directory, manifest)
    return manifest


def write_report(directory: Path, values: Mapping[str, Any]) -> None:
    (directory / REPORT).write_text(signed_json(values, _SELF))


def read_report(directory: Path) -> dict[str, Any]:
    """The report of an artifact; {} where there is none that can be trusted: it decides speed only,
    and what it decides is then measured or left alone."""
    try:
        raw = json.loads((directory / REPORT).read_text())
        if isinstance(raw, dict) and _SELF in raw:
            raw = _checked_report(directory)
    except ArtifactError as error:
        logger.warning("[Artifact] %s; its tuned settings are not used", error)
        return {}
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def complete_artifact(
    directory: Path, manifest: Manifest, advance: Callable[[int], None] = lambda num_bytes: None
) -> Manifest:
    """Make the folder a whole artifact: hash its files into `files`, from them `artifact_id`, write
    the manifest and seal. `advance`: hears of bytes as they are hashed."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in (MANIFEST, REPORT):
            size = path.stat().st_size
            files[path.name] = FileEntry(file_sha256(path), size)
            advance(size)
    artifact_id = compute_artifact_id(manifest.source_sha256, manifest.recipe, files)
    manifest = replace(manifest, files=files, artifact_id=artifact_id)
    (directory / MANIFEST).write_text(manifest.to_json())
    _seal(directory, manifest)
    return manifest


def _seal(directory: Path, manifest: Manifest) -> None:
    """Remember size, mtime and inode of files just hashed. A read-only folder is left unsealed."""
    identities = {name: _identity(directory / name) for name in manifest.files}
    try:
        (directory / SEAL).write_text(json.dumps(identities))
    except OSError:
        return


def _checked_report(directory: Path) -> dict[str, Any]:
    path = directory / REPORT
    try:
        text = path.read_bytes().decode()
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    check_signed(raw, text, _SELF, str(path))
    return raw


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read_seal(directory: Path) -> dict[str, list[int]]:
    try:
        raw: Any = json.loads((directory / SEAL).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}
