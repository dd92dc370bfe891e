"""Models that lie on this machine: read in place, never copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optimizer.sources.remote_files import MODEL_PATTERNS
from optimizer.sources.source import Arrivals, Fetched
from torchweave_ray.errors import ArtifactError


@dataclass(frozen=True)
class FolderSource:
    """A Hugging Face folder: config.json, tokenizer.json, *.safetensors."""

    path: Path

    @property
    def text(self) -> str:
        return str(self.path)

    def identity(self) -> list[str]:
        return [_identity(path) for path in model_files(self.path)]

    def fetch(self, folder: Path, arrivals: Arrivals) -> Fetched:
        return Fetched(self.path, model_files(self.path))


@dataclass(frozen=True)
class GgufSource:
    """One .gguf file."""

    path: Path

    @property
    def text(self) -> str:
        return str(self.path)

    def identity(self) -> list[str]:
        return [_identity(self.path)] if self.path.is_file() else []

    def fetch(self, folder: Path, arrivals: Arrivals) -> Fetched:
        if not self.path.is_file():
            raise ArtifactError(f"{self.path} is gone")
        return Fetched(self.path, (self.path,))


def model_files(folder: Path, follow: bool = False) -> tuple[Path, ...]:
    """Files of a model folder that staging may read, in a fixed order; subfolders are not read.

    A link may lead elsewhere in the folder, or within a Hugging Face cache, which is made of links.
    Raises ArtifactError for one that leads further: whoever made the folder would choose which
    file of this machine is published. `follow`: the hub's client made it.
    """
    found = {path for pattern in MODEL_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        root = root.parents[2]
    for path in () if follow else found:
        target = path.resolve()
        if path.is_symlink() and not target.is_relative_to(root):
            raise ArtifactError(
                f"{path} is a link out of its folder, to {target}: put the file there itself"
            )
    return tuple(sorted(found))


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
