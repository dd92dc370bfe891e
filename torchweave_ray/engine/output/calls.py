"""Calls that a loop has another thread make, and waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from torchweave_ray.errors import TorchWeaveError

Action = Callable[[], None]


class Calls:
    def __init__(self, post: Callable[[Action], None], call_soon: Callable[[Action], None]) -> None:
        """`post` has the thread call, `call_soon` the loop."""
        self._post = post
        self._call_soon = call_soon
        self._open: set[asyncio.Future[None]] = set()

    async def make(self, action: Action) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open.add(done)

        def act() -> None:
            action()
            self._call_soon(lambda: None if done.done() else done.set_result(None))

        self._post(act)
        try:
            await done
        finally:
            self._open.discard(done)

    def fail(self, error: TorchWeaveError) -> None:
        """The thread has ended; what `action` raises ends it, too."""
        for done in self._open:
            if not done.done():
                done.set_exception(error)
