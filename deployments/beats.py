"""Signs of life on a stream of items, so that its end can be told from silence. Knows no Ray.

gRPC keeps no connection alive by itself: a frozen process or a silent node would hang an open call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from deployments.bus.listener import HEARTBEAT_S

T = TypeVar("T")
B = TypeVar("B")


async def with_beats(
    items: AsyncIterator[T], beat: B, every_s: float = HEARTBEAT_S
) -> AsyncGenerator[T | B]:
    """`items`, with a `beat` before them and whenever none has come for `every_s`."""
    yield beat
    pending: asyncio.Future[T | None] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(items, None))
            done, _ = await asyncio.wait([pending], timeout=every_s)
            if not done:
                yield beat
                continue
            item = pending.result()
            pending = None
            if item is None:
                return
            yield item
    finally:
        if pending is not None:  # whoever listened has left: what makes the items must hear of it
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
