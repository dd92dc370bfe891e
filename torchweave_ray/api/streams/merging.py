"""Several streams as one, in the order that their items come. Knows nothing of what they carry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merged(sources: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Until the last one ends; the first error ends all, and so does leaving early.

    A task each: as they share a queue, none waits for another one's reader.
    """
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[T]) -> None:
        try:
            async for item in source:
                queue.put_nowait((item,))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    num_open = len(tasks)
    try:
        while num_open:
            news = await queue.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                num_open -= 1
            else:
                yield news[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
