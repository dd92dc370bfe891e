"""Large files of a Hugging Face repository, brought into the hub's own cache by chunks.

The hub's client starts a file anew when a run was killed. What lies in its cache as a blob it takes
as it is, so these files are put there and it does the rest. Layout:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote

import requests

from optimizer.sources.download import download
from optimizer.sources.http_files import HttpFiles
from optimizer.sources.redaction import public_url, scrub
from optimizer.sources.remote_files import is_plain_name
from optimizer.sources.retry import HttpStatus, retried
from optimizer.sources.source import Arrivals
from torchweave_ray.errors import ArtifactError

LARGE = 64 << 20
"""Bytes; what is smaller may as well be brought anew."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fill_cache(
    repo_id: str,
    revision: str | None,
    is_wanted: Callable[[str], bool],
    folder: Path,
    arrivals: Arrivals,
) -> dict[str, str]:
    """sha256 of each file that was brought, by its path in the repository.

    `folder`: for what has not arrived whole. Raises ArtifactError, and what the client raises.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import get_hf_file_metadata, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    api = HfApi()
    commit = api.model_info(repo_id, revision=revision or constants.DEFAULT_REVISION).sha
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    blobs /= "blobs"
    hashes = {}
    for entry in api.list_repo_tree(repo_id, revision=commit, recursive=True):
        path, size = entry.path, getattr(entry, "size", None)
        if size is None or size < LARGE or not is_wanted(path):
            continue
        if isinstance(try_to_load_from_cache(repo_id, path, revision=commit), str):
            continue
        url = hf_hub_url(repo_id, path, revision=commit)
        etag = get_hf_file_metadata(url).etag
        if is_plain_name(etag) and not (blobs / etag).exists():
            hashes[path] = _bring(url, build_hf_headers(), etag, blobs, folder, arrivals)
    return hashes


def _bring(
    url: str,
    headers: Mapping[str, str],
    etag: str,
    blobs: Path,
    folder: Path,
    arrivals: Arrivals,
) -> str:
    parent, _, name = url.rpartition("/")
    remote = HttpFiles(parent, headers)
    folder = folder / etag[:16]
    try:
        files = [retried(lambda: remote.stat(unquote(name)))]
        path, sha256 = next(iter(download(remote, files, folder, arrivals).items()))
    except (HttpStatus, requests.RequestException) as error:
        said = f"cannot fetch {public_url(url)}: {type(error).__name__}: {scrub(str(error), url)}"
        raise ArtifactError(f"{said}; run again, it goes on from here") from None
    if _SHA256.fullmatch(etag) and etag != sha256:
        shutil.rmtree(folder)
        raise ArtifactError(f"{public_url(url)} has sha256 {sha256}, the hub says {etag}")
    blobs.mkdir(parents=True, exist_ok=True)
    part = blobs / f"{etag}.{os.getpid()}.part"
    shutil.move(path, part)  # the cache may be on another disk
    part.replace(blobs / etag)
    shutil.rmtree(folder)
    return sha256
