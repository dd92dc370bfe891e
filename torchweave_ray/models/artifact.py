"""The artifact's format: the optimizer writes it, replicas read it, neither imports the other.

    artifact/
      manifest.json            this module's `Manifest`
      model.safetensors        fused tensors under the names DecoderSpec uses, packed or row-major;
                               of quantised ones codes, and scales as "<name>.scales"
      config.json              the source's Hugging Face config
      generation_config.json   its end tokens and sampling defaults, if it had one
      tokenizer.json, tokenizer_config.json (with the chat template)
      report.json              how it came about: times, quality, tuning; not covered by the id

Whole hashes are checked when publishing and fetching; at start size, mtime and inode are compared
with what `seal` recorded then, so that a start reads no weights twice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchweave_ray.errors import ArtifactError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEAL = ".seal.json"
REPORT = "report.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is. `artifact_id` covers format, source, recipe and weights."""

    artifact_id: str
    source: str
    source_sha256: str
    architecture: str
    dtype: str
    """Of activations and the KV cache, and of weights that are not quantised."""
    layout: str
    """Packed layout of the weights; "fused" = plain row-major tensors, qkv and gate-up fused."""
    files: dict[str, FileEntry]
    revision: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, str] = field(default_factory=dict)
    """Format by tensor group; "none" by the name of a tensor that was left out; {} = none."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Raises ArtifactError for a newer format or a missing field."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
            if version != FORMAT_VERSION:
                raise ArtifactError(
                    f"{where}: format version {version}, this build reads {FORMAT_VERSION}; "
                    "stage the model again with `torchweave optimize`"
                )
            raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            return cls(**raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{where}: not a manifest ({error!r})") from error


def compute_artifact_id(source_sha256: str, recipe: dict[str, Any], weights_sha256: str) -> str:
    """Equal for a resumed or repeated run of the same recipe on the same source."""
    canonical = json.dumps(
        [FORMAT_VERSION, source_sha256, recipe, weights_sha256],
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Raises ArtifactError saying which file is missing or unreadable."""
    path = directory / MANIFEST
    try:
        text = path.read_text()
    except OSError as error:
        raise ArtifactError(
            f"no artifact in {directory}: {MANIFEST} is missing; "
            "stage a model first with `torchweave optimize`"
        ) from error
    return Manifest.from_json(text, str(path))


def verify_artifact(directory: Path, full: bool = False) -> Manifest:
    """Read the manifest and check every file it lists.

    `full` hashes everything; otherwise a file is trusted when size, mtime and inode are those
    that the last whole check sealed, and hashed when they are not.
    Raises ArtifactError naming the first file that is missing, cut or altered.
    """
    manifest = read_manifest(directory)
    sealed = {} if full else _read_seal(directory)
    fresh = False
    for name, entry in sorted(manifest.files.items()):
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
    if fresh:
        seal(directory, manifest)
    return manifest


def read_report(directory: Path) -> dict[str, Any]:
    """The report of an artifact; {} where there is none that can be read: nothing depends on it."""
    try:
        raw = json.loads((directory / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def seal(directory: Path, manifest: Manifest) -> None:
    """Remember size, mtime and inode of files just hashed. A read-only folder is left unsealed."""
    identities = {name: _identity(directory / name) for name in manifest.files}
    try:
        (directory / SEAL).write_text(json.dumps(identities))
    except OSError:
        return


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read_seal(directory: Path) -> dict[str, list[int]]:
    try:
        raw: dict[str, list[int]] = json.loads((directory / SEAL).read_text())
        return raw
    except (OSError, ValueError):
        return {}
