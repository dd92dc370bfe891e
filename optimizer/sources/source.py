"""The protocol of a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Advance = Callable[[int], None]
"""Told how many bytes more have arrived."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model on this machine: a folder of safetensors or one .gguf file."""

    path: Path
    files: tuple[Path, ...]
    """All that staging reads; their hashes make `source_sha256`."""
    revision: str | None = None
    """The commit that a branch or tag stood for."""


class Source(Protocol):
    @property
    def text(self) -> str:
        """How the manifest names it: absolute and complete."""
        ...

    def identity(self) -> list[str] | None:
        """Changes when a local source is edited; None for a remote one, fetched once."""
        ...

    def fetch(self, folder: Path, advance: Advance) -> Fetched:
        """Bring the files here, downloads below `folder`, resuming what is there already.

        Raises ArtifactError in one line that says what to do.
        """
        ...
