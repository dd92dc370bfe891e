"""Models behind a URL, a .gguf file or a folder with safetensors: HTTP(S), or any fsspec driver."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from optimizer.sources.download import download
from optimizer.sources.redaction import public_url, query_identity, scrub, scrubbed_logs
from optimizer.sources.remote_files import (
    RemoteFile,
    RemoteFiles,
    check_names,
    check_shards,
    is_model_file,
)
from optimizer.sources.retry import retried, status_of
from optimizer.sources.source import Arrivals, Fetched
from torchweave_ray.errors import ArtifactError, ConfigError, nearest

# What is asked for where nothing is listed. One of the first two makes it a model or an adapter.
_CONFIGS = ("config.json", "adapter_config.json")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_OTHERS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "adapter_model.safetensors",
)
_WEB = ("http", "https")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*", re.ASCII)


@dataclass(frozen=True)
class RemoteSource:
    url: str = field(repr=False)
    """Whole, with what it may be signed with: only requests see it."""

    @property
    def text(self) -> str:
        return public_url(self.url)

    @property
    def stem(self) -> str:
        return PurePosixPath(unquote(urlsplit(self.text).path)).name.removesuffix(".gguf")

    def identity(self) -> list[str] | None:
        return query_identity(self.url)

    def fetch(self, folder: Path, arrivals: Arrivals) -> Fetched:
        # Another query may mean another file: it does not continue this one.
        folder /= (self.identity() or ["plain"])[0][:16]
        base, member = self._split()
        with scrubbed_logs(self.url):
            remote = open_files(base)
            try:
                if member is not None:
                    files = [_stat(remote, member)]
                    hashes = download(remote, files, folder, arrivals)
                    return Fetched(folder / member, (folder / member,), hashes=hashes)
                return _folder(remote, folder, arrivals, self.text)
            except ArtifactError:
                raise
            except Exception as error:  # each driver raises its own
                raise ArtifactError(self._explain(error)) from None

    def _split(self) -> tuple[str, str | None]:
        """The folder's URL and, of a .gguf file, its name."""
        address, mark, query = self.url.partition("?")
        if not address.endswith(".gguf"):
            return self.url, None
        parent, _, name = address.rpartition("/")
        member = unquote(name) if address.partition("://")[0] in _WEB else name
        check_names([member], self.text)
        return parent + mark + query, member

    def _explain(self, error: Exception) -> str:
        status = status_of(error)
        where = f" ({scrub(str(error), self.url)})" if isinstance(error, FileNotFoundError) else ""
        if status in (404, 410):
            return f"{self.text} is not there{where}"
        if status in (401, 403):
            return (
                f"{self.text} may not be read ({status}): set the credentials of this kind of "
                "URL in the environment, or sign the URL anew"
            )
        said = scrub(str(error), self.url)
        return f"cannot fetch {self.text}: {type(error).__name__}: {said}"[:500]


def parse_remote(url: str) -> RemoteSource:
    """Raises ConfigError for a scheme that no driver has; it never shows more than `public_url`."""
    scheme = url.partition("://")[0]
    said = public_url(url)
    if "::" in scheme:
        raise ConfigError(f"source {said!r}: a chain of URLs is not supported, name the file's own")
    if not _SCHEME.fullmatch(scheme):
        raise ConfigError(f"source {said!r} is no URL")
    from fsspec.registry import known_implementations, registry

    known = set(known_implementations) | set(registry)
    if scheme not in known:
        raise ConfigError(f"source {said!r}: no driver for {scheme}://{nearest(scheme, known)}")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"source {said!r} is no URL") from error
    if parts.fragment:
        raise ConfigError(f"source {said!r}: a URL names its file by the path, not after '#'")
    if scheme in _WEB and not parts.hostname:
        raise ConfigError(f"source {said!r} names no host")
    return RemoteSource(url)


def open_files(url: str) -> RemoteFiles:
    """Those of the folder at `url`."""
    # Imported here: they bring HTTP and fsspec, which a recipe that is staged already needs not.
    if urlsplit(url).scheme in _WEB:
        from optimizer.sources.http_files import HttpFiles

        return HttpFiles(url)
    from optimizer.sources.fsspec_files import FsspecFiles

    return FsspecFiles(url)


def _folder(remote: RemoteFiles, folder: Path, arrivals: Arrivals, text: str) -> Fetched:
    listed = retried(remote.names)
    if listed is not None:
        names = [name for name in listed if is_model_file(name)]
        if not names:
            raise FileNotFoundError(f"no {' or '.join(_CONFIGS)}")
        hashes = download(remote, [_stat(remote, name) for name in names], folder, arrivals)
        return Fetched(folder, tuple(hashes), hashes=hashes)
    files = _ask(remote, (*_CONFIGS, *_OTHERS, _INDEX))
    if not any(file.name in _CONFIGS for file in files):
        _stat(remote, _CONFIGS[0])  # raises what is wrong with it
    hashes = download(remote, files, folder, arrivals)
    if folder / _INDEX in hashes:
        shards = _shards(folder / _INDEX, text)
        weights = [_stat(remote, name) for name in shards]
    else:
        weights = _ask(remote, (_WEIGHTS,))
    hashes |= download(remote, weights, folder, arrivals)
    return Fetched(folder, tuple(sorted(hashes)), hashes=hashes)


def _stat(remote: RemoteFiles, name: str) -> RemoteFile:
    return retried(lambda: remote.stat(name))


def _ask(remote: RemoteFiles, names: Iterable[str]) -> list[RemoteFile]:
    """Those that are there. A bucket that may not be listed says 403 of what it has not."""

    def ask(name: str) -> RemoteFile | None:
        with suppress(FileNotFoundError):
            try:
                return _stat(remote, name)
            except Exception as error:
                if status_of(error) not in (401, 403, 404, 410):
                    raise
        return None

    with ThreadPoolExecutor(remote.num_connections) as pool:
        return [file for file in pool.map(ask, names) if file is not None]


def _shards(path: Path, text: str) -> list[str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{text}: {path.name} has no weight_map") from error
    check_shards(shards, f"{text}: {path.name}")
    return sorted(shards)
