"""Runs the lines of a file that are not in the journal yet, so many at once.

Knows neither who answers nor what the file becomes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from torchweave_ray.batch.answering import Ask, insist
from torchweave_ray.batch.journal import Journal
from torchweave_ray.batch.lines import BadLine, Line, refusal, result_of

Done = Callable[[dict[str, Any]], None]
"""Called with each result."""


async def run_lines(
    lines: Iterable[Line], journal: Journal, ask: Ask, concurrency: int, done: Done
) -> None:
    """Every line ends as a result; raises only what keeps all of them from being answered."""
    left = (line for line in lines if line.key not in journal)

    async def work() -> None:
        for line in left:
            result = await answer_line(line, ask)
            journal.add(line.key, result)
            done(result)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def answer_line(line: Line, ask: Ask) -> dict[str, Any]:
    if isinstance(line.wanted, BadLine):
        return result_of(line, line.wanted)
    answer = refusal(line.wanted) or await insist(ask, line.wanted)
    return result_of(line, answer)
