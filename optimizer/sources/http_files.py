"""Files of a web server: ranges, versions, and redirects that lead nowhere they should not.

Proxies, certificates and passwords (~/.netrc) are the environment's, as `requests` reads them.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import requests
from requests.adapters import HTTPAdapter

from optimizer.sources.redaction import public_url
from optimizer.sources.remote_files import RemoteFile
from optimizer.sources.retry import HttpStatus
from torchweave_ray.errors import ArtifactError

_CONNECTIONS = 8
_TIMEOUT_S = (15, 60)
"""To connect; without a byte."""
_MAX_REDIRECTS = 5
_PIECE = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_IDENTITY = {"Accept-Encoding": "identity"}


class HttpFiles:
    num_connections = _CONNECTIONS

    def __init__(self, url: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """`url` of the folder; a query goes to each of its files. `headers` go to its host only."""
        self._parts = urlsplit(url)
        self._headers = headers
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))

    def names(self) -> None:
        """Pages that list a folder are for people."""

    def folders(self) -> list[str]:
        return []

    def stat(self, name: str) -> RemoteFile:
        """By a GET of the first byte: a URL that is signed for GET allows no HEAD."""
        with self._get(name, {"Range": "bytes=0-0"}, (200, 206, 416)) as response:
            headers = response.headers
            version = headers.get("ETag") or headers.get("Last-Modified") or ""
            if response.status_code == 206 and (found := _RANGE.match(headers["Content-Range"])):
                return RemoteFile(name, int(found[3]), version, can_seek=True)
            if response.status_code == 416:
                return RemoteFile(name, 0, version, can_seek=False)
            length = headers.get("Content-Length", "")
            plain = headers.get("Content-Encoding", "identity") == "identity"
            size = int(length) if length.isdecimal() and plain else None
            return RemoteFile(name, size, version, can_seek=False)

    def read(self, file: RemoteFile, start: int, end: int) -> bytes:
        with self._get(file.name, {"Range": f"bytes={start}-{end - 1}"}, (206,)) as response:
            found = _RANGE.match(response.headers.get("Content-Range", ""))
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if version != file.version or found is None or int(found[3]) != file.size:
                raise ArtifactError(f"{self.public(file.name)} changed while it was fetched")
            if (int(found[1]), int(found[2])) != (start, end - 1):
                raise requests.ConnectionError("another range than was asked for")
            data = response.content
        if len(data) != end - start:
            raise requests.ConnectionError(f"{len(data)} bytes of {end - start} came")
        return data

    def stream(self, file: RemoteFile) -> Iterator[bytes]:
        with self._get(file.name, {}, (200,)) as response:
            yield from response.iter_content(_PIECE)

    def public(self, name: str) -> str:
        return public_url(self._url(name))

    def _url(self, name: str) -> str:
        path = f"{self._parts.path.rstrip('/')}/{quote(name)}"
        return urlunsplit((*self._parts[:2], path, self._parts.query, ""))

    def _get(
        self, name: str, headers: dict[str, str], wanted: tuple[int, ...]
    ) -> requests.Response:
        """An open response. Follows redirects one by one: a password goes to its own host only."""
        url = self._url(name)
        for _ in range(_MAX_REDIRECTS + 1):
            own = self._headers if urlsplit(url)[:2] == self._parts[:2] else {}
            response = self._session.get(
                url,
                headers={**own, **_IDENTITY, **headers},
                stream=True,
                allow_redirects=False,
                timeout=_TIMEOUT_S,
            )
            if response.status_code in wanted:
                return response
            response.close()
            target = response.headers.get("Location")
            if not response.is_redirect or target is None:
                raise _refusal(response)
            url = _checked_redirect(url, urljoin(url, target))
        raise ArtifactError(f"{self.public(name)} is redirected more than {_MAX_REDIRECTS} times")


def _refusal(response: requests.Response) -> HttpStatus:
    wait = response.headers.get("Retry-After", "")
    return HttpStatus(response.status_code, float(wait) if wait.isdecimal() else None)


def _checked_redirect(source: str, target: str) -> str:
    """No server may send us from the outside to this network, or from TLS to plain text."""
    old, new = urlsplit(source), urlsplit(target)
    said = f"{public_url(source)} is redirected to {public_url(target)}"
    if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
        raise ArtifactError(f"{said}: not followed, it is not https")
    if new.hostname != old.hostname and _is_inside(new.hostname) and not _is_inside(old.hostname):
        raise ArtifactError(f"{said}: not followed, that address is inside this network")
    return target


def _is_inside(host: str | None) -> bool:
    """Whether a name stands for an address of this machine or network, as far as it resolves."""
    try:
        found = socket.getaddrinfo(host or "", None)
    except (OSError, UnicodeError):
        return False
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    return any(not ipaddress.ip_address(address).is_global for address in addresses)
