"""The protocol of a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol


class Arrivals(Protocol):
    """Told of what a source brings here."""

    def expect(self, num_bytes: int) -> None:
        """So many bytes more are to come."""
        ...

    def advance(self, num_bytes: int) -> None:
        """So many bytes more have arrived."""
        ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model on this machine: a folder of safetensors or one .gguf file."""

    path: Path
    files: tuple[Path, ...]
    """All that staging reads; their hashes make `source_sha256`."""
    revision: str | None = None
    """The commit that a branch or tag stood for."""
    hashes: Mapping[Path, str] = field(default_factory=lambda: MappingProxyType({}))
    """sha256 of those files that were hashed as they arrived."""


class Source(Protocol):
    @property
    def text(self) -> str:
        """How the manifest names it: absolute and complete."""
        ...

    def identity(self) -> list[str] | None:
        """Changes when a local source is edited; None for a remote one, fetched once."""
        ...

    def fetch(self, folder: Path, arrivals: Arrivals) -> Fetched:
        """Bring the files here, downloads below `folder`, resuming what is there already.

        Raises ArtifactError in one line that says what to do.
        """
        ...
