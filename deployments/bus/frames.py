"""The wire format of the token bus: length-prefixed JSON, never pickle.

A frame is a list of entries, one per stream; [] is a heartbeat. An entry is [stream_id, delta...];
one without deltas says that the replica has accepted that stream. Knows no sockets.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from torchweave_ray.errors import TorchWeaveError
from torchweave_ray.outputs import ChoiceDelta, FinishReason, TokenLogprobs

HEARTBEAT: list[Any] = []
MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("!I")
_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)


class FrameError(TorchWeaveError):
    """The peer does not speak this format."""


def encode_frame(value: Any) -> bytes:
    body = _ENCODER.encode(value).encode("ascii")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into decoded frames."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The frames that `data` completes; raises FrameError for one too long or not JSON."""
        self._buffer += data
        frames: list[Any] = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > self.max_bytes:
                raise FrameError(f"a frame of {size} bytes, at most {self.max_bytes} are allowed")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                frames.append(json.loads(body))
            except ValueError as error:
                raise FrameError(f"not a JSON frame: {error}") from error
        return frames


def encode_delta(delta: ChoiceDelta) -> list[Any]:
    """[index, first_index, token_ids, text], and the rest only where there is any."""
    row: list[Any] = [delta.index, delta.first_index, delta.token_ids, delta.text]
    if delta.finish_reason is not None or delta.logprobs is not None:
        logprobs = delta.logprobs
        row += [
            delta.finish_reason,
            delta.stop_reason,
            delta.error,
            None if logprobs is None else [_encode_logprobs(entry) for entry in logprobs],
        ]
    return row


def decode_delta(row: list[Any]) -> ChoiceDelta:
    index, first_index, token_ids, text = row[:4]
    if len(row) == 4:
        return ChoiceDelta(index, first_index, tuple(token_ids), text)
    finish, stop_reason, error, logprobs = row[4:]
    return ChoiceDelta(
        index,
        first_index,
        tuple(token_ids),
        text,
        None if logprobs is None else tuple(_decode_logprobs(entry) for entry in logprobs),
        None if finish is None else FinishReason(finish),
        stop_reason,
        error,
    )


def _encode_logprobs(entry: TokenLogprobs) -> list[Any]:
    return [entry.token_id, entry.logprob, entry.rank, entry.top]


def _decode_logprobs(row: list[Any]) -> TokenLogprobs:
    token_id, logprob, rank, top = row
    return TokenLogprobs(token_id, logprob, rank, tuple((t, p) for t, p in top))
