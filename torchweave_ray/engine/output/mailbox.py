"""Outputs of one request on their way from an engine's step to whoever reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from torchweave_ray.errors import TorchWeaveError
from torchweave_ray.outputs import RequestOutput, merge_outputs


class Mailbox:
    """On one loop."""

    def __init__(self) -> None:
        self._items: list[RequestOutput | TorchWeaveError] = []
        self._arrived = asyncio.Event()

    def put(self, item: RequestOutput | TorchWeaveError) -> None:
        self._items.append(item)
        self._arrived.set()

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Until the last; an error is raised."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            items, self._items = self._items, []
            outputs = [item for item in items if isinstance(item, RequestOutput)]
            if outputs:  # a slow reader gets several steps merged
                yield merge_outputs(outputs)
            if isinstance(items[-1], TorchWeaveError):
                raise items[-1]
            if outputs[-1].is_last:
                return
