"""Requests of streams that may be opened again: kept while they run, and for a while after.

Bounded in number and bytes; the oldest that has ended goes first. Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.stream_origin import StreamOrigin

MAX_RECORDS = 4096
MAX_BYTES = 64 << 20
_OVERHEAD_BYTES = 2048


@dataclass(slots=True)
class _Record:
    request: GenerateRequest
    num_bytes: int
    num_running: int = 0
    """After a failover the choices of one request run on their own."""
    expires_at: float = 0.0


_Key = tuple[str, int]


class StreamRecords:
    def __init__(
        self,
        max_records: int = MAX_RECORDS,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._clock = clock
        self._running: OrderedDict[_Key, _Record] = OrderedDict()
        self._ended: OrderedDict[_Key, _Record] = OrderedDict()
        """In the order of their ends."""
        self._num_bytes = 0

    @contextmanager
    def keep(self, request: GenerateRequest) -> Iterator[None]:
        """Until some time after this block; nothing when the request is no stream's."""
        origin = request.origin
        if origin is None:
            yield
            return
        key = origin.call_id, origin.index
        record = self._take(key) or _Record(_as_asked(request, origin), _size_of(request, origin))
        record.num_running += 1
        self._put(self._running, key, record)
        try:
            yield
        finally:
            record.num_running -= 1
            if not record.num_running and self._running.get(key) is record:
                self._take(key)
                record.expires_at = self._clock() + origin.keep_s
                self._put(self._ended, key, record)

    def recall(self, call_id: str) -> list[GenerateRequest]:
        """As they were first asked; a call with several prompts has several."""
        self._sweep()
        both = [*self._running.items(), *self._ended.items()]
        return [record.request for (own_id, _), record in both if own_id == call_id]

    def _put(self, where: OrderedDict[_Key, _Record], key: _Key, record: _Record) -> None:
        where[key] = record
        self._num_bytes += record.num_bytes
        self._sweep()

    def _take(self, key: _Key) -> _Record | None:
        record = self._running.pop(key, None) or self._ended.pop(key, None)
        if record is not None:
            self._num_bytes -= record.num_bytes
        return record

    def _sweep(self) -> None:
        now = self._clock()
        while self._ended and next(iter(self._ended.values())).expires_at <= now:
            self._take(next(iter(self._ended)))
        while self._num_bytes > self._max_bytes or (
            len(self._running) + len(self._ended) > self._max_records
        ):
            self._take(next(iter(self._ended or self._running)))


def whole(requests: Iterable[GenerateRequest]) -> list[GenerateRequest]:
    """One of each of a call's requests, in their order; [] when some are missing."""
    by_index = {request.origin.index: request for request in requests if request.origin}
    first = by_index.get(0)
    if first is None or first.origin is None or len(by_index) < first.origin.num_requests:
        return []
    return [by_index[index] for index in sorted(by_index)]


def _as_asked(request: GenerateRequest, origin: StreamOrigin) -> GenerateRequest:
    return replace(
        request,
        request_id=origin.request_id,
        n=origin.n,
        sampling=replace(request.sampling, seed=origin.seed),
        output_token_ids=(),
        emitted_chars=0,
        delivery=None,
        routing=None,
    )


def _size_of(request: GenerateRequest, origin: StreamOrigin) -> int:
    """About what it takes in memory."""
    num_tokens = len(request.prompt_token_ids)
    return _OVERHEAD_BYTES + len(origin.body) + 8 * num_tokens + len(request.grammar or "")
