"""A real engine behind real sockets: full queues, deadlines, and clients of every bad manner."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.overload.server import (
    Server,
    connect,
    idle_connections,
    read_response,
    request_bytes,
    reset,
    running_server,
    send_zeros,
    until,
)

LONG = {"prompt": [5] * 40, "max_tokens": 8000, "ignore_eos": True, "stream": True}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with running_server(max_num_seqs=1, max_num_batched_tokens=64, max_waiting_tokens=600) as it:
        yield it


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    yield shared
    until(shared.is_idle)


def ask(server: Server, body: dict[str, object], **headers: str) -> tuple[int, dict[str, str], str]:
    with connect(server.port) as client:
        client.sendall(request_bytes(PATH, body, **headers))
        status, received, content = read_response(client)
        return status, received, content.decode()


def occupy(server: Server) -> socket.socket:
    """The one slot is taken by a stream until its socket is closed."""
    client = connect(server.port)
    client.sendall(request_bytes(PATH, LONG))
    assert client.recv(10)
    until(lambda: server.engine.snapshot().num_running == 1)
    return client


def queue(server: Server, tokens: int) -> socket.socket:
    before = server.engine.snapshot().num_waiting
    client = connect(server.port)
    client.sendall(request_bytes(PATH, {"prompt": [6 + before] * tokens, "max_tokens": 5}))
    until(lambda: server.engine.snapshot().num_waiting == before + 1)
    return client


def test_a_full_queue_is_429_with_the_seconds_to_wait(server: Server) -> None:
    with occupy(server), queue(server, 300), queue(server, 300):
        assert server.engine.snapshot().num_waiting_tokens == 600
        status, headers, text = ask(server, {"prompt": [9] * 100, "max_tokens": 5})
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        error = json.loads(text)["error"]
        assert error["code"] == "queue_full"
        assert "600 prompt tokens are waiting, this request adds 100" in error["message"]


def test_what_is_cached_is_let_in_where_the_same_length_is_not(server: Server) -> None:
    known: dict[str, object] = {"prompt": [11] * 400, "max_tokens": 2}
    assert ask(server, known)[0] == 200
    with occupy(server), queue(server, 560):
        assert ask(server, {**known, "prompt": [12] * 400})[0] == 429
        with connect(server.port) as client:
            client.sendall(request_bytes(PATH, known))
            until(lambda: server.engine.snapshot().num_waiting == 2)
            assert server.engine.snapshot().num_waiting_tokens == 560 + 16


@pytest.mark.parametrize("by_header", [True, False])
def test_a_deadline_passes_in_the_queue(server: Server, by_header: bool) -> None:
    body: dict[str, object] = {"prompt": [7] * 50, "max_tokens": 5}
    with occupy(server):
        if by_header:
            status, _, text = ask(server, body, x_deadline_ms="60")
        else:
            status, _, text = ask(server, {**body, "deadline_ms": 60})
        assert status == 504
        assert json.loads(text)["error"]["code"] == "deadline_exceeded"
        until(lambda: server.engine.snapshot().num_waiting == 0)
        assert server.engine.snapshot().num_running == 1, "the other one goes on"


def test_a_deadline_ends_a_stream_and_frees_its_blocks(server: Server) -> None:
    with connect(server.port) as client:
        client.sendall(request_bytes(PATH, {**LONG, "deadline_ms": 200}, Connection="close"))
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert b"200 OK" in received
    assert received.count(b"the deadline passed") == 1
    assert b'"deadline_exceeded"' in received


Leave = Callable[[Server], socket.socket]


def before_a_byte(server: Server) -> socket.socket:
    return connect(server.port)


def inside_the_headers(server: Server) -> socket.socket:
    client = connect(server.port)
    client.sendall(request_bytes(PATH, LONG)[:40])
    return client


def inside_the_body(server: Server) -> socket.socket:
    client = connect(server.port)
    client.sendall(request_bytes(PATH, LONG)[:-10])
    return client


def when_all_is_sent(server: Server) -> socket.socket:
    client = connect(server.port)
    client.sendall(request_bytes(PATH, LONG))
    return client


def in_the_prompt(server: Server) -> socket.socket:
    client = connect(server.port)
    client.sendall(request_bytes(PATH, {**LONG, "prompt": [8, 9] * 2500, "max_tokens": 9}))
    until(lambda: 0 < server.engine.snapshot().num_waiting_tokens < 4900)
    return client


def in_the_answer(server: Server) -> socket.socket:
    return occupy(server)


STAGES: list[Leave] = [before_a_byte, inside_the_headers, inside_the_body, when_all_is_sent]
STAGES += [in_the_prompt, in_the_answer]


@pytest.mark.parametrize("hang_up", [reset, socket.socket.close], ids=["reset", "close"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_client_that_vanishes_leaves_nothing_behind(
    server: Server, stage: Leave, hang_up: Callable[[socket.socket], None]
) -> None:
    hang_up(stage(server))
    until(server.is_idle)
    assert ask(server, {"prompt": [3] * 20, "max_tokens": 3})[0] == 200


@pytest.mark.parametrize("hang_up", [reset, socket.socket.close], ids=["reset", "close"])
def test_one_that_vanishes_from_the_queue_gives_its_place_back(
    server: Server, hang_up: Callable[[socket.socket], None]
) -> None:
    with occupy(server):
        hang_up(queue(server, 500))
        until(lambda: server.engine.snapshot().num_waiting_tokens == 0)
        with queue(server, 550):
            assert server.engine.snapshot().num_waiting_tokens == 550


@pytest.mark.parametrize("is_announced", [True, False])
def test_ten_megabytes_are_413_before_they_are_read(server: Server, is_announced: bool) -> None:
    """Announced or not; the connection still gets its answer."""
    with connect(server.port) as client:
        send_zeros(client, PATH, 10 << 20, is_announced)
        status, _, body = read_response(client)
    assert status == 413
    error = json.loads(body)["error"]
    assert error["code"] == "body_too_large"
    assert f"over {4 << 20} bytes" in error["message"]


def test_a_slow_reader_is_waited_for_and_not_buffered(server: Server) -> None:
    """It takes a few bytes; the engine ends its work, and what waits in the server is its text
    merged, not an event for each token."""
    with connect(server.port, receive_buffer=4096) as client:
        client.sendall(request_bytes(PATH, {**LONG, "max_tokens": 4000}, Connection="close"))
        for _ in range(5):
            assert len(client.recv(1)) == 1
        until(lambda: server.is_idle(), 30)
        assert ask(server, {"prompt": [3] * 20, "max_tokens": 3})[0] == 200
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.rstrip().endswith(b"0")
    assert b"[DONE]" in received
    chunks = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    events = received.count(b"data: ")
    assert events < 4000 / 4, "the buffers were full: what came later is one event"


@pytest.mark.slow
def test_a_thousand_idle_connections_keep_nobody_from_an_answer(server: Server) -> None:
    with idle_connections(server.port, 1000, request_bytes(PATH, LONG)):
        assert ask(server, {"prompt": [3] * 20, "max_tokens": 3})[0] == 200
        with occupy(server):
            assert server.engine.snapshot().num_running == 1
        until(server.is_idle)
    assert ask(server, {"prompt": [3] * 20, "max_tokens": 3})[0] == 200
