"""Files of any place that fsspec reads: s3://, gs://, az://, sftp://, memory:// and others.

Credentials are the environment's, as each driver reads them; none are passed from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimizer.sources.redaction import public_url, scrub
from optimizer.sources.remote_files import RemoteFile
from torchweave_ray.errors import ArtifactError

_CONNECTIONS = 8
_PIECE = 4 << 20
_VERSIONS = ("ETag", "etag", "md5Hash", "md5", "LastModified", "last_modified", "mtime", "created")


class FsspecFiles:
    def __init__(self, url: str) -> None:
        """`url` of the folder. Raises ArtifactError naming the package that it needs."""
        from fsspec.core import url_to_fs  # 0.1 s

        protocol = url.partition("://")[0].partition("::")[0]
        try:
            self._fs, self._root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            # fsspec's table of drivers says "Install s3fs to access S3".
            raise ArtifactError(
                f"cannot read {public_url(url)}: {scrub(str(error), url)} (the {protocol}:// "
                "driver is a package of its own; pip installs it)"
            ) from None
        except Exception as error:  # each driver raises its own
            raise ArtifactError(
                f"cannot open {public_url(url)}: {type(error).__name__}: {scrub(str(error), url)}"
            ) from None
        # Drivers without an event loop of their own promise nothing to threads.
        self.num_connections = _CONNECTIONS if self._fs.async_impl else 1

    def names(self) -> list[str]:
        prefix = self._root.rstrip("/") + "/"
        found = []
        for entry in self._fs.ls(self._root, detail=True):
            path = str(entry["name"])
            if entry.get("islink"):  # of drivers that read this machine's own files
                raise ArtifactError(f"{path} is a link: put the file there itself")
            if entry["type"] == "file" and path.startswith(prefix):
                found.append(path.removeprefix(prefix))
        return sorted(found)

    def folders(self) -> list[str]:
        entries = self._fs.ls(self._root, detail=True)
        paths = (str(e["name"]).rstrip("/") for e in entries if e["type"] == "directory")
        return sorted(path.rpartition("/")[2] for path in paths)

    def stat(self, name: str) -> RemoteFile:
        info: Mapping[str, Any] = self._fs.info(self._path(name))
        if info.get("type") == "directory":
            raise FileNotFoundError(name)
        said = [f"{key}={info[key]}" for key in _VERSIONS if info.get(key)]
        size = info.get("size")
        return RemoteFile(name, size, said[0] if said else "", can_seek=size is not None)

    def read(self, file: RemoteFile, start: int, end: int) -> bytes:
        data = bytes(self._fs.cat_file(self._path(file.name), start=start, end=end))
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} bytes of {end - start} came")
        return data

    def stream(self, file: RemoteFile) -> Iterator[bytes]:
        with self._fs.open(self._path(file.name), "rb") as opened:
            while piece := opened.read(_PIECE):
                yield piece

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
