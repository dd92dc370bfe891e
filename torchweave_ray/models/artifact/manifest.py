"""`Manifest`: what an artifact is, as text and back, and the hashes that hold it together.

The text carries a hash of itself, and the artifact's id one of every file. Touches no folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchweave_ray.errors import ArtifactError

FORMAT_VERSION = 2
"""2: manifest and report carry hashes of themselves. 1, which is read, had none."""
MANIFEST = "manifest.json"
SEAL = ".seal.json"
REPORT = "report.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_OLDEST_VERSION = 1
_SELF = "manifest_sha256"
_CHUNK = 1 << 22
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is. `artifact_id` covers format, source, recipe and every file."""

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

    @property
    def kv_dtype(self) -> str:
        """What the recipe asked for the KV cache: "int8", or "auto" for the model's own dtype."""
        asked = self.recipe.get("quantization")
        return "int8" if isinstance(asked, dict) and asked.get("kv") == "int8" else "auto"

    def to_json(self) -> str:
        return signed_json(asdict(self), _SELF)

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Raises ArtifactError for a newer format, an altered text, a missing or unknown field."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not a manifest ({error!r})") from error
        _check_version(version, where)
        if version >= 2:
            check_signed(raw, text, _SELF, where)
            del raw[_SELF]
        _check_fields(raw, where)
        raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        return cls(**raw)

    def check_id(self, where: str) -> None:
        """Raises ArtifactError unless the id is that of this content."""
        wanted = compute_artifact_id(
            self.source_sha256, self.recipe, self.files, self.format_version
        )
        if wanted != self.artifact_id:
            raise ArtifactError(
                f"{where} was altered: its content has the id {wanted}, it says {self.artifact_id}"
            )


def compute_artifact_id(
    source_sha256: str,
    recipe: Mapping[str, Any],
    files: Mapping[str, FileEntry],
    version: int = FORMAT_VERSION,
) -> str:
    """Equal for a resumed or repeated run of the same recipe on the same source; two artifacts of
    one id have equal weights, config and tokenizer."""
    hashes = {name: entry.sha256 for name, entry in files.items()}
    content = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return _hash([version, source_sha256, dict(recipe), content])[:24]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def signed_json(values: Mapping[str, Any], key: str) -> str:
    """A document for people that holds the hash of its own values under `key`."""
    return _dump({**values, key: _hash(dict(values))})


def check_signed(raw: dict[str, Any], text: str, key: str, where: str) -> None:
    """Raises ArtifactError unless `text`, read as `raw`, is to the byte what was signed."""
    said = raw.get(key)
    if said != _hash({k: v for k, v in raw.items() if k != key}) or text != _dump(raw):
        raise ArtifactError(f"{where} was altered: its content is not what its {key} says")


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _hash(values: Any) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_version(version: Any, where: str) -> None:
    if not isinstance(version, int) or version < _OLDEST_VERSION:
        raise ArtifactError(
            f"{where}: format version {version!r} is not one that this build reads "
            f"({_OLDEST_VERSION} to {FORMAT_VERSION}); stage the model again with "
            "`torchweave optimize`"
        )
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: format version {version} is newer than {FORMAT_VERSION}, the last one that "
            "this build reads; upgrade torchweave-ray, or stage the model again with "
            "`torchweave optimize`"
        )


def _check_fields(raw: Mapping[str, Any], where: str) -> None:
    known = {item.name: item for item in fields(Manifest)}
    if unknown := sorted(raw.keys() - known.keys()):
        raise ArtifactError(f"{where}: unknown field {unknown[0]!r}")
    for name, item in known.items():
        if name not in raw:
            if item.default is MISSING and item.default_factory is MISSING:
                raise ArtifactError(f"{where}: not a manifest, field {name!r} is missing")
        elif not isinstance(raw[name], kinds := _KINDS.get(name, (str,))):
            named = " or ".join(kind.__name__ for kind in kinds)
            raise ArtifactError(f"{where}: field {name!r} must be {named}")
    for name, entry in raw["files"].items():
        # A name is joined to folders: it must not lead out of them.
        if name != Path(name).name or name.startswith(".") or not _is_possible(name):
            raise ArtifactError(f"{where}: {name!r} cannot be a file of an artifact")
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "size"}:
            raise ArtifactError(f"{where}: the entry of {name} must have sha256 and size")


def _is_possible(name: str) -> bool:
    return 0 < len(name) <= _LONGEST_NAME and name.isprintable()


_KINDS: Mapping[str, tuple[type, ...]] = {
    "files": (dict,),
    "recipe": (dict,),
    "quantization": (dict,),
    "revision": (str, type(None)),
    "format_version": (int,),
}
"""Of fields that are not text."""
