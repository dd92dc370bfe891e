"""The calls of a Hugging Face hub that a snapshot download makes, over one folder. No test here."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from torchweave_ray.models.artifact import file_sha256


class _Server(ThreadingHTTPServer):
    repo_id: str
    folder: Path
    commit: str
    revisions: tuple[str, ...]
    answers: list[tuple[str, int, int]]
    """Name, status and bytes of each answer."""

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *arguments: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        api, files = f"/api/models/{hub.repo_id}/", f"/{hub.repo_id}/resolve/{hub.commit}/"
        if path in [f"{api}revision/{revision}" for revision in hub.revisions]:
            self._answer(json.dumps({"id": hub.repo_id, "sha": hub.commit}).encode())
        elif path == f"{api}tree/{hub.commit}":
            self._answer(json.dumps([self._row(file) for file in hub.files()]).encode())
        elif path.startswith(files):
            self._send(hub.folder / path.removeprefix(files))
        else:
            self._refuse("RevisionNotFound" if path.startswith(api) else "RepoNotFound")

    def _row(self, file: Path) -> dict[str, Any]:
        name = file.relative_to(self.server.folder).as_posix()
        blob = file_sha256(file)[:40]
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": blob}

    def _send(self, file: Path) -> None:
        data, span = file.read_bytes(), self.headers.get("Range", "")
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", span):
            start, end = int(found[1]), min(int(found[2]) + 1, len(data))
            said = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            self._answer(data[start:end], 206, file_sha256(file), **said)
        else:
            self._answer(data, 200, file_sha256(file))

    def _answer(self, data: bytes, status: int = 200, etag: str = "", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", self.server.commit)
        for name, value in (headers | {"ETag": f'"{etag}"'}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
            self.server.answers.append((self.path.rpartition("/")[2], status, len(data)))

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class FakeHub:
    """A context manager that gives the hub's URL."""

    def __init__(self, repo_id: str, folder: Path, commit: str, revisions: tuple[str, ...]) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.repo_id, self._server.folder = repo_id, folder
        self._server.commit, self._server.revisions = commit, revisions
        self.answers: list[tuple[str, int, int]] = []
        self._server.answers = self.answers
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
