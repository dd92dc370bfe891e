"""Requests that are running here, by the id that their client knows, and how to stop one.

A stopped request ends as if it had come to its end: its client gets what there is, "abort" and the
usage. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager

from torchweave_ray.outputs import ChoiceDelta, FinishReason, GenerateRequest, RequestOutput, Usage

_CALL_ID = re.compile("[0-9a-f]{32}")
"""Nothing shorter is looked for: an id has to be known whole."""


class StopSwitch:
    """Of one engine request."""

    def __init__(self) -> None:
        self.is_on = False
        self._waiting: asyncio.Task[object] | None = None

    def stop(self) -> None:
        self.is_on = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def outputs(
        self, outputs: AsyncIterator[RequestOutput], request: GenerateRequest
    ) -> AsyncGenerator[RequestOutput]:
        """Those of the request until they end or it is stopped. Closing them is the caller's."""
        counts = [0] * request.n
        is_open = [True] * request.n
        while not self.is_on:
            self._waiting = asyncio.current_task()
            try:
                output = await anext(outputs)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                task = self._waiting
                if not self.is_on or task is None or task.uncancel() > 0:
                    raise  # by somebody else: the client has left
                break
            finally:
                self._waiting = None
            for delta in output.deltas:
                counts[delta.index] += len(delta.token_ids)
                is_open[delta.index] = delta.finish_reason is None
            yield output
            if output.is_last:
                return
        yield RequestOutput(
            request.request_id,
            tuple(
                ChoiceDelta(index, counts[index], (), "", None, FinishReason.ABORT)
                for index in range(request.n)
                if is_open[index]
            ),
            Usage(len(request.prompt_token_ids), sum(counts), 0),
        )


def call_id_of(answer_id: str) -> str | None:
    """A call's own id in that of its answer, which has "chatcmpl-" and the like before it; None:
    no answer has such an id."""
    call_id = answer_id.replace("_", "-").rpartition("-")[2]
    return call_id if _CALL_ID.fullmatch(call_id) else None


class RunningRequests:
    def __init__(self) -> None:
        self._switches: dict[str, list[StopSwitch]] = {}

    @contextmanager
    def open(self, call_id: str, num_requests: int) -> Iterator[list[StopSwitch]]:
        switches = self._switches[call_id] = [StopSwitch() for _ in range(num_requests)]
        try:
            yield switches
        finally:
            if self._switches.get(call_id) is switches:  # else the call was made again meanwhile
                del self._switches[call_id]

    def stop(self, call_id: str) -> bool:
        """False when no such call is running here."""
        switches = self._switches.get(call_id)
        for switch in switches or ():
            switch.stop()
        return switches is not None
