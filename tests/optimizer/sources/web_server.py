"""A web server over one folder with ranges, versions, passwords and failures. No test here."""

from __future__ import annotations

import base64
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from torchweave_ray.models.artifact import file_sha256


class WebServer(ThreadingHTTPServer):
    """A context manager. What it does is changed by its fields, what it saw is in the others."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = True
        self.password: str | None = None
        self.redirect: str | None = None
        """Where to, instead of an answer; the path is added."""
        self.statuses: dict[str, list[int]] = {}
        """By name: what to answer first; the last one is repeated if it is negative."""
        self.cut: int = 0
        """So many answers break off half way."""
        self.num_bytes = 0
        self.paths: list[str] = []
        self.passwords: list[str | None] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None: ...


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        web, name = self.server, Path(unquote(urlsplit(self.path).path)).name
        web.paths.append(self.path)
        given = self.headers.get("Authorization")
        web.passwords.append(given)
        if web.redirect is not None:
            self._refuse(302, Location=f"{web.redirect}/{name}")
            return
        status = self._status(name)
        wanted = web.password and "Basic " + base64.b64encode(web.password.encode()).decode()
        if wanted and given != wanted:
            status = 401
        file = web.folder / unquote(urlsplit(self.path).path).lstrip("/")
        file = file if file.is_file() else web.folder / name
        if status is None and not file.is_file():
            status = 404
        if status is not None:
            self._refuse(status)
        else:
            self._send(file)

    def _status(self, name: str) -> int | None:
        left = self.server.statuses.get(name)
        if not left:
            return None
        return -left[0] if left[0] < 0 else left.pop(0)

    def _refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: Path) -> None:
        data = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span and self.server.ranges:
            start, end = int(span[1]), min(int(span[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{file_sha256(file)[:16]}"')
        self.end_headers()
        if self.server.cut and len(data) > 1:
            self.server.cut -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)
        if len(data) > 1:
            self.server.num_bytes += len(data)
