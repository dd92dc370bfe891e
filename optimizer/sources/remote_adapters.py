"""LoRA adapters behind a URL that are fetched when they are asked for, each into a folder here."""

from __future__ import annotations

import hashlib
import logging
import time
from functools import partial
from pathlib import Path

from filelock import FileLock

from optimizer.progress import LogProgress
from optimizer.sources.download import download
from optimizer.sources.redaction import public_url, scrub, scrubbed_logs
from optimizer.sources.remote import open_files
from optimizer.sources.remote_files import RemoteFile, RemoteFiles
from optimizer.sources.retry import retried, status_of
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.lora.folder import is_name
from torchweave_ray.models.lora.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS

logger = logging.getLogger(__name__)

FRESH_S = 30.0
"""So long after it was looked at the place is not asked whether an adapter has changed."""


class RemoteAdapters:
    """A `models.lora.folder.AdapterSource`; several processes may share `cache`."""

    def __init__(self, url: str, cache: Path) -> None:
        self._url = url
        self._cache = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._looked_at: dict[str, float] = {}

    def names(self) -> list[str]:
        """Those in the folder, where the place lists folders; and all that were fetched."""
        found = set(self._looked_at)
        try:
            with scrubbed_logs(self._url):
                found.update(filter(is_name, open_files(self._url).folders()))
        except Exception as error:  # each driver raises its own
            logger.warning("[Adapter] %s cannot be listed: %s", *self._said(error))
        return sorted(found)

    def folder(self, name: str) -> Path | None:
        if not is_name(name):
            return None
        folder = self._cache / name
        if time.monotonic() - self._looked_at.get(name, -FRESH_S) < FRESH_S:
            return folder
        address, mark, query = self._url.partition("?")
        with scrubbed_logs(self._url):
            try:
                remote = open_files(f"{address.rstrip('/')}/{name}{mark}{query}")
                files = _stats(remote)
                if files is None:
                    self._looked_at.pop(name, None)
                    return None
                self._cache.mkdir(parents=True, exist_ok=True)
                with FileLock(self._cache / f"{name}.lock"):
                    download(remote, files, folder, LogProgress())
            except ArtifactError:
                raise
            except Exception as error:
                where, why = self._said(error)
                raise ArtifactError(f"it cannot be fetched from {where}: {why}") from None
        self._looked_at[name] = time.monotonic()
        return folder

    def _said(self, error: Exception) -> tuple[str, str]:
        said = f"{type(error).__name__}: {scrub(str(error), self._url)}"
        return public_url(self._url), said[:300]


def _stats(remote: RemoteFiles) -> list[RemoteFile] | None:
    try:
        return [retried(partial(remote.stat, n)) for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    except FileNotFoundError:
        return None
    except Exception as error:
        if status_of(error) in (404, 410):
            return None
        raise
