"""The load generator's HTTP parser: every way a response may be cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweave_ray.bench.load.http_client import Connection, HTTPFailure, ResponseParser

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"b\r\ndata: 0\r\n\r\n\r\n5;ext=1\r\nhello\r\n0\r\n\r\n"
)
BY_LENGTH = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nhello"


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % len(data) for c in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 10_000), max_size=12))
def test_a_chunked_body_cut_anywhere(cuts: list[int]) -> None:
    """A chunk whose text ends like the end of the body does not end it."""
    parser = ResponseParser()
    pieces = _cut(CHUNKED, cuts)
    complete = [parser.feed(piece, float(i)) for i, piece in enumerate(pieces)]
    assert complete == [False] * (len(pieces) - 1) + [True]
    assert parser.status == 200
    assert [payload for _, payload in parser.chunks] == [b"data: 0\r\n\r\n", b"hello"]


@given(st.lists(st.integers(0, 10_000), max_size=8))
def test_a_body_by_length_cut_anywhere(cuts: list[int]) -> None:
    parser = ResponseParser()
    complete = [parser.feed(piece, 0.0) for piece in _cut(BY_LENGTH, cuts)]
    assert complete[-1]
    assert not any(complete[:-1])
    assert b"".join(payload for _, payload in parser.chunks) == b"hello"
    assert not parser.feed_eof()


def test_a_chunk_carries_the_time_of_its_last_byte() -> None:
    parser = ResponseParser()
    parser.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nab", 1.0)
    parser.feed(b"cd\r\n", 2.0)
    assert parser.chunks == [(2.0, b"abcd")]


def test_a_body_without_length_ends_with_the_stream() -> None:
    parser = ResponseParser()
    assert not parser.feed(b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nhe", 1.0)
    assert not parser.feed(b"llo", 2.0)
    assert parser.feed_eof()
    assert not parser.keep_alive


def test_interim_answers_are_skipped() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.1 100 Continue\r\n\r\n" + BY_LENGTH, 0.0)
    assert parser.status == 404


def test_what_is_not_http_is_refused() -> None:
    with pytest.raises(HTTPFailure, match="not an HTTP/1 answer"):
        ResponseParser().feed(b"SSH-2.0-OpenSSH\r\n\r\n", 0.0)
    with pytest.raises(HTTPFailure, match="not an http"):
        Connection("localhost:8000")
