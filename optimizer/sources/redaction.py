"""URLs as they may be shown: without the user, password and query that somebody may sign with.

Manifests, reports, errors and logs get `public_url`; only the request itself sees the whole URL.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

_HIDDEN = "***"
_SHORTEST = 4
"""Of what is scrubbed from a text: shorter values would blank out half of it."""
_WITH_AUTHORITY = re.compile(r"\w[\w+.-]*://[^\s'\"]+", re.ASCII)
# Parameters that sign a URL and say nothing of what it names: AWS, Google, CloudFront, Azure.
_SIGNATURES = re.compile(
    r"x-(amz|goog|ms)-.*|signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid"
    r"|(access_|auth_|private_)?token|api_?key|sig|se|sp|st|sv|sr|spr|sks|ske|skt|skv|skoid|sktid",
    re.IGNORECASE,
)


def public_url(url: str) -> str:
    """Scheme, host and path; `?***` where there was a query; of a chain (`a::b`) link by link."""
    return "::".join(_public(link) for link in url.split("::"))


def query_identity(url: str) -> list[str] | None:
    """Changes with those parameters that may name another file; None where there are none."""
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    named = sorted(pair for pair in pairs if not _SIGNATURES.fullmatch(pair[0]))
    return [hashlib.sha256(urlencode(named).encode()).hexdigest()] if named else None


def scrub(text: str, url: str) -> str:
    """What some library says about `url`, fit to be shown: on one line, without its secrets."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    text = _WITH_AUTHORITY.sub(lambda found: _public(found[0]), text)
    return " ".join(text.split())


@contextmanager
def scrubbed_logs(url: str) -> Iterator[None]:
    """The HTTP client logs each request's target: it shall not log a signature."""
    logger = logging.getLogger("urllib3.connectionpool")
    filtering = _Scrubbing(url)
    logger.addFilter(filtering)
    try:
        yield
    finally:
        logger.removeFilter(filtering)


class _Scrubbing(logging.Filter):
    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def filter(self, record: logging.LogRecord) -> bool:
        # A redirect's target has a query of its own.
        text = re.sub(r"\?[^\s\"']+", f"?{_HIDDEN}", record.getMessage())
        record.msg, record.args = scrub(text, self._url), ()
        return True


def _public(link: str) -> str:
    scheme, separator, rest = link.partition("://")
    if not separator:
        return link
    address, has_query, _ = rest.partition("#")[0].partition("?")
    authority, slash, path = address.partition("/")
    host = authority.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}" + (f"?{_HIDDEN}" if has_query else "")


def _secrets(url: str) -> set[str]:
    found: set[str] = set()
    for link in url.split("::"):
        try:
            parts = urlsplit(link)
        except ValueError:
            continue
        userinfo = parts.netloc.rpartition("@")[0]
        values = [userinfo, *userinfo.split(":", 1), parts.query]
        values += [pair.partition("=")[2] for pair in parts.query.split("&")]
        found |= {*values, *map(unquote, values)}
    return {value for value in found if len(value) >= _SHORTEST}
