"""Our streaming client behind a connection that is cut anywhere: it goes on and misses nothing."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.api.conftest import Server
from tests.fakes import Script
from torchweave_ray.client import Event, StreamFailed, stream

PATH, BODY = "/v1/completions", {"prompt": "abc", "stream": True}
SCRIPT = Script(pieces=("Gra", "vity", "\n\n", "pulls", " 😀", " us."))


def request_from(client: socket.socket) -> bytes:
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += client.recv(1 << 16)
    head, _, body = raw.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length is not None and len(body) < int(length[1]):
        body += client.recv(1 << 16)
    return head + b"\r\nConnection: close\r\n\r\n" + body


@contextmanager
def cutting(port: int, cuts: list[int]) -> Iterator[str]:
    """A way to the server; the i-th connection breaks after cuts[i] bytes of its answer."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            left = cuts.pop(0) if cuts else 1 << 30
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                server.sendall(request_from(client))
                while left > 0 and (data := server.recv(left)):
                    client.sendall(data)
                    left -= len(data)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def shown(events: list[Event]) -> list[str]:
    """Without the id and time, which are each answer's own."""
    return [event.data.partition('"choices"')[2] for event in events]


def test_every_cut_is_made_good(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchweave_ray.client._PAUSE_S", 0.0)
    server.backend.script = SCRIPT
    whole = list(stream(server.url, PATH, BODY))
    assert whole[-1].data == "[DONE]"
    for cut in range(700, 2600, 190):
        with cutting(server.port, [cut, 500, 900]) as url:
            events = list(stream(url, PATH, BODY))
        assert [event.id[32:] for event in events] == [event.id[32:] for event in whole], cut
        assert len({event.id[:32] for event in events}) == 1
        assert shown(events) == shown(whole)


def test_a_request_of_which_nothing_has_come_is_made_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchweave_ray.client._PAUSE_S", 0.0)
    with cutting(server.port, [0, 0]) as url:
        assert list(stream(url, PATH, BODY))[-1].data == "[DONE]"
    with cutting(server.port, [0, 0, 0]) as url, pytest.raises(StreamFailed, match="lost"):
        list(stream(url, PATH, BODY))


def test_it_says_what_it_cannot_make_good(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchweave_ray.client._PAUSE_S", 0.0)
    with pytest.raises(StreamFailed, match="HTTP 400") as refused:
        list(stream(server.url, PATH, {"prompt": "", "stream": True}))
    assert refused.value.status == 400
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(StreamFailed, match="lost"):
        list(stream(dead, PATH, BODY))
    assert list(stream([dead, server.url], PATH, BODY))[-1].data == "[DONE]"
    with cutting(server.port, [900]) as url:
        events = stream(url, PATH, BODY, patience_s=-1.0)
        with pytest.raises(StreamFailed, match="lost"):
            list(events)
