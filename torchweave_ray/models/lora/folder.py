"""Where adapters come from at run time: a folder with one folder for each, by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from torchweave_ray.errors import ConfigError
from torchweave_ray.models.lora.peft import ADAPTER_CONFIG

_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)


def is_name(name: str) -> bool:
    """Whether an adapter may be called so: it becomes a folder's name, and follows a colon."""
    return _NAME.fullmatch(name) is not None


class AdapterSource(Protocol):
    """Any thread may call."""

    def names(self) -> list[str]: ...

    def folder(self, name: str) -> Path | None:
        """A folder here as PEFT saves it, brought here if need be; None: there is none of this
        name. Raises ArtifactError for one that cannot be fetched."""
        ...


class AdapterFolder:
    """An `AdapterSource`: read anew at every call, so adapters may come and go."""

    def __init__(self, root: Path) -> None:
        """A folder of adapters, or a single adapter's. Raises ConfigError if it is no folder."""
        if not root.is_dir():
            raise ConfigError(f"lora.source {str(root)!r} is no folder here")
        self._root = root.absolute()

    def names(self) -> list[str]:
        if _is_adapter(self._root):
            return [self._root.name]
        return sorted(
            path.name for path in self._root.iterdir() if is_name(path.name) and _is_adapter(path)
        )

    def folder(self, name: str) -> Path | None:
        if not is_name(name):
            return None
        if _is_adapter(self._root):
            return self._root if name == self._root.name else None
        path = self._root / name
        return path if _is_adapter(path) else None


def _is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file()
