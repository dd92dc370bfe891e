"""A recipe's `adapters`: LoRA adapters that are merged into the model, each with a scale.

Parsed strictly. Knows where an adapter comes from, not its format, and loads no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.sources import Source, parse_source
from torchweave_ray.errors import ConfigError, nearest

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Adapter:
    source: str = field(repr=False)  # a URL may hold a signature
    """Where its adapter_config.json and adapter_model.safetensors are: a folder, org/name of the
    Hugging Face hub, or a URL of a folder."""
    scale: float = 1.0
    """Times what the adapter's own configuration says."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    sha256: str | None = None
    """What its two files must hash to: the digest that the report shows."""

    def __post_init__(self) -> None:
        for name in ("source", "revision", "sha256"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name != "source"):
                raise ConfigError(f"recipe.adapters: {name} must be text, got {value!r}")
        is_number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not is_number or not math.isfinite(self.scale) or self.scale == 0:
            raise ConfigError(
                f"recipe.adapters: scale must be a number other than 0, got {self.scale!r}"
            )
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ConfigError(
                f"recipe.adapters: sha256 must be 64 lower case hex digits, got {self.sha256}"
            )

    def open_source(self) -> Source:
        return parse_source(self.source, self.revision)


def parse_adapters(value: Any, folder: Path) -> tuple[Adapter, ...]:
    """Of a recipe: a list of mappings, or of sources alone. Relative paths are taken from
    `folder`. Raises ConfigError naming the nearest key."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"recipe.adapters must be a list, got {value!r}")
    return tuple(_parse(item, folder) for item in value)


def _parse(item: Any, folder: Path) -> Adapter:
    values = {"source": item} if isinstance(item, str) else item
    if not isinstance(values, Mapping) or "source" not in values:
        raise ConfigError("recipe.adapters: each one needs a source")
    known = [entry.name for entry in dataclasses.fields(Adapter)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in adapters{nearest(str(key), known)}")
    source = values["source"]
    if isinstance(source, str) and (local := folder / Path(source).expanduser()).exists():
        source = str(local.resolve())
    return Adapter(**{**values, "source": source})
