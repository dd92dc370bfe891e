"""Messages between rank 0 and another rank: JSON with its length before it, over loopback.

Beside the collectives, for what the host has to know: what the next step is, replies, signs of
life. An end of file is a dead peer. Never pickle.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from typing import Any

Message = dict[str, Any]
HOST = "127.0.0.1"
"""Ranks of a replica are on one machine."""
MOST_BYTES = 64 << 20
"""Of a message; more is none of ours."""
_LENGTH = struct.Struct("!I")


class Channel:
    """Any thread may send; one receives."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises OSError when nobody is there."""
        body = json.dumps(message).encode()
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> Message | None:
        """None: the other side is gone, or none of ours."""
        try:
            head = self._exactly(_LENGTH.size)
            length = _LENGTH.unpack(head)[0] if head else 0
            body = self._exactly(length) if length <= MOST_BYTES else b""
            message: Message | None = json.loads(body) if body else None
        except (OSError, ValueError):
            return None
        return message

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, num_bytes: int) -> bytes:
        """b"" at the end of the file."""
        found = bytearray()
        while len(found) < num_bytes:
            piece = self._socket.recv(num_bytes - len(found))
            if not piece:
                return b""
            found += piece
        return bytes(found)


def connect(port: int, timeout_s: float) -> Channel:
    connected = socket.create_connection((HOST, port), timeout_s)
    connected.settimeout(None)
    return Channel(connected)
