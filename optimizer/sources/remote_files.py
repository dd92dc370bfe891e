"""The protocol of a place with files behind a URL, and the names that a model's folder may hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from torchweave_ray.errors import ArtifactError

MODEL_PATTERNS = ("*.safetensors", "*.json", "*.jinja")
"""Files of a model's folder that staging may read."""
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class RemoteFile:
    name: str
    size: int | None
    version: str
    """Changes with the content: an ETag or a time, as far as the place says one."""
    can_seek: bool


class RemoteFiles(Protocol):
    num_connections: int
    """Reads that may run at once."""

    def names(self) -> list[str] | None:
        """Files of the folder, not of its subfolders; None: this place lists nothing."""
        ...

    def folders(self) -> list[str]:
        """Subfolders; none where this place lists nothing."""
        ...

    def stat(self, name: str) -> RemoteFile: ...

    def read(self, file: RemoteFile, start: int, end: int) -> bytes:
        """Bytes start..end-1, and no fewer."""
        ...

    def stream(self, file: RemoteFile) -> Iterator[bytes]: ...


def is_plain_name(name: object) -> bool:
    """Of a file in the folder itself: what a listing or an index says may not lead out of it."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= _LONGEST_NAME
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def is_model_file(name: str) -> bool:
    return is_plain_name(name) and any(fnmatchcase(name, pattern) for pattern in MODEL_PATTERNS)


def check_names(names: Iterable[object], what: str) -> None:
    """Raises ArtifactError for a name that leads out of the folder."""
    for name in names:
        if not is_plain_name(name):
            raise ArtifactError(f"{what} names {name!r}, which is no file of its own folder")


def check_shards(names: Iterable[object], what: str) -> None:
    """As `check_names`, of what an index says holds the weights."""
    for name in names:
        if not (is_plain_name(name) and str(name).endswith(".safetensors")):
            raise ArtifactError(f"{what} names {name!r}, no .safetensors file of its own folder")
