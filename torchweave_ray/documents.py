"""Files that people write: YAML, or JSON where the name ends so. Knows none of their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from torchweave_ray.errors import ConfigError


def read_document(path: Path, what: str = "") -> Any:
    """`what`: stands before the path in the ConfigError of a file that is missing or no document,
    such as "recipe "."""
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("YAML", yaml.safe_load)
    try:
        return parse(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {what}{path}: {error.strerror}") from error
    # ValueErrors are bytes that are no text, and dates that never were.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{what}{path} is not {kind}: {' '.join(str(error).split())}") from error
