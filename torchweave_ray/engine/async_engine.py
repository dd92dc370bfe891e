"""The engine behind asyncio: one thread steps it, one loop talks to it.

Adds and aborts wait in an inbox that is drained between steps; all outputs of a step reach the
loop in one call. A `Backend` by shape. Knows nothing of Ray or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from torchweave_ray.config import tuned_limits
from torchweave_ray.engine.adapters.served import served_model, served_models
from torchweave_ray.engine.admission import Coming, refusal_of
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.grammar import polite_thread
from torchweave_ray.engine.meter import Meter
from torchweave_ray.engine.output.calls import Calls
from torchweave_ray.engine.output.mailbox import Mailbox
from torchweave_ray.errors import (
    EngineDead,
    InvalidRequest,
    RequestError,
    TorchWeaveError,
    Unavailable,
)
from torchweave_ray.outputs import GenerateRequest, ModelInfo, RequestOutput, Stats
from torchweave_ray.reported import Reported

logger = logging.getLogger(__name__)

Sink = Callable[[RequestOutput | TorchWeaveError], None]
"""Called on the loop with each output; an error is the last thing it hears."""

_IDLE_BEAT_S, _SAVE_BEAT_S = 1.0, 0.1
_STUCK_S = 120.0


class AsyncEngine:
    def __init__(
        self,
        engine: Engine,
        info: ModelInfo,
        *,
        stats_interval_s: float = 10.0,
        after_step: Callable[[], None] | None = None,
        sleep_after_s: float | None = None,
    ) -> None:
        """`after_step` is called on the loop once all sinks of a step have been. `sleep_after_s`:
        idleness after which it sleeps."""
        self._engine = engine
        self._info = info
        self._after_step = after_step
        self._sleep_after_s = sleep_after_s or math.inf
        self._idle_s, self._beat_s = 0.0, _IDLE_BEAT_S
        self._capacity = self._limits = engine.scheduler_config
        self._sinks: dict[str, Sink] = {}  # only the loop touches it
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._compiling = polite_thread()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._closing = False
        self._calls = Calls(self._post, self._call_soon)
        self._death: BaseException | None = None
        self._last_beat = time.monotonic()
        self.meter = Meter(stats_interval_s, info.id, engine)

    # On the loop.

    def start(self) -> None:
        """Start the engine thread; call inside the running loop that will use it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._compiling.submit(self._engine.warm_grammars)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        """Outputs until the last; leaving early aborts. Raises RequestError when refused."""
        mailbox = Mailbox()
        await self.prepare(request)
        self.add(request, mailbox.put)
        try:
            async for output in mailbox.outputs():
                yield output
        finally:
            self.abort(request.request_id)

    async def prepare(self, request: GenerateRequest) -> None:
        """Find its adapter and compile its grammar before `add`, which would do it on the loop."""
        if request.adapter:
            await asyncio.to_thread(self._engine.adapters.check, request)
        if request.grammar is not None:
            check = partial(self._engine.check, request)
            await asyncio.get_running_loop().run_in_executor(self._compiling, check)

    def add(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue it. Raises RequestError when it can be refused at once; else the sink hears it."""
        self.check_health()
        if self._draining:
            raise Unavailable("this replica is shutting down", None, "draining", 1.0)
        self._engine.check(request)
        if request.request_id in self._sinks:
            raise InvalidRequest(f"request id {request.request_id} is in use", "request_id")
        coming = self._engine.admission.look(request, self.meter.refused)
        self._sinks[request.request_id] = sink
        self._idle.clear()
        self._post(partial(self._add, request, coming))

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds by the next step; unknown ids are ignored."""
        if self._sinks.pop(request_id, None) is not None:
            self._post(partial(self._engine.abort, request_id))
            self._note_idle()

    async def stop(self, call_id: str) -> bool:
        """See `Backend`: their sinks hear of the end as of any other."""
        found = [request_id for request_id in self._sinks if call_id in request_id]
        for request_id in found:
            self._post(partial(self._engine.abort, request_id))
        return bool(found)

    async def models(self) -> list[ModelInfo]:
        return await served_models(self._info, self._engine.adapters)

    async def info(self, model: str) -> ModelInfo:
        return await served_model(model, self._info, self._engine.adapters)

    async def sleeping(self, model: str | None, want: bool | None) -> dict[str, list[bool]]:
        """Sleep if idle, wake up, or neither: whether it sleeps then."""
        self.check_health()
        if want is not None:
            await self._calls.make(self._engine.rest.sleep if want else self._engine.rest.wake)
        return {self._info.id: [self._engine.rest.is_sleeping]}

    async def stats(self) -> dict[str, Stats]:
        return {self._info.id: self.snapshot()}

    async def metrics(self) -> list[Reported]:
        return [self.meter.metrics.report()]

    def snapshot(self) -> Stats:
        """Stats of this instant; counters may be a step apart."""
        return self._engine.stats()

    @property
    def max_num_seqs(self) -> int:
        """As it is now: `update_limits` may have lowered it."""
        return self._limits.max_num_seqs

    def update_limits(self, **changes: Any) -> None:
        """Change TUNABLE_LIMITS in place, within what the engine was started with, which those that
        are not named go back to. Atomic; raises ConfigError naming the key."""
        self._limits = config = tuned_limits(self._capacity, changes)
        self._post(partial(self._engine.update_scheduler_config, config))

    def check_health(self) -> None:
        """Raise EngineDead if the thread or the runner is gone, or has been stuck in one step."""
        if self._death is not None:
            raise EngineDead(f"the engine has stopped: {self._death!r}")
        self._engine.check_health()
        stuck = time.monotonic() - self._last_beat
        if self._thread.ident is not None and stuck > _STUCK_S:
            raise EngineDead(f"the engine has not finished a step for {stuck:.0f} s")

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the others; False if some had to be aborted."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return not await self.stop("")
        return True

    @property
    def is_on_its_loop(self) -> bool:
        return asyncio._get_running_loop() is self._loop

    def close(self) -> None:
        """Stop the thread after the step it is in; requests still here end with EngineDead."""
        self._closing = True
        self._wake.set()
        self._compiling.shutdown(wait=False)
        if self._thread.ident is not None:
            self._thread.join()
        if self._death is None:
            self._fail_all(EngineDead("the engine was closed"))
        self._engine.close()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue  # aborted while its step ran
            if output.is_last:
                del self._sinks[output.request_id]
            sink(refusal_of(output) or output)
        if self._after_step is not None:
            self._after_step()
        self._note_idle()

    def _refuse(self, request_id: str, error: RequestError) -> None:
        sink = self._sinks.pop(request_id, None)
        if sink is not None:
            sink(error)
        self._note_idle()

    def _fail_all(self, error: TorchWeaveError) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(error)
        self._calls.fail(error)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._sinks:
            self._idle.set()

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake.set()

    # On the engine thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._last_beat = time.monotonic()
                self._drain_inbox()
                if self._engine.has_work:
                    self._step()
                else:
                    self._wait()
        except BaseException as error:
            logger.exception("the engine stopped")
            self.meter.dump()
            self._death = error
            dead = EngineDead(f"the engine stopped: {error!r}")
            self._call_soon(partial(self._fail_all, dead))

    def _step(self) -> None:
        outputs = self._engine.step()
        if outputs:
            self._call_soon(partial(self._deliver, outputs))
        self.meter.measure(outputs, time.monotonic() - self._last_beat)

    def _wait(self) -> None:
        self.meter.pause()
        tick_s = self._limits.schedule_tick_ms / 1e3
        if not self._wake.wait(self._beat_s):
            self._idle_s += self._beat_s
            self._beat_s = _SAVE_BEAT_S if self._engine.spill.save() else _IDLE_BEAT_S
            if self._idle_s >= self._sleep_after_s:
                self._engine.rest.sleep()
            return
        self._idle_s, self._beat_s = 0.0, _IDLE_BEAT_S
        if tick_s and not self._closing:
            time.sleep(tick_s)  # more may arrive, to share the first step

    def _drain_inbox(self) -> None:
        self._wake.clear()
        while self._inbox:
            self._inbox.popleft()()

    def _add(self, request: GenerateRequest, coming: Coming) -> None:
        self._engine.admission.note_arrival(coming)
        try:
            self._engine.add(request, is_bounded=True)
            self.meter.open(request)
        except RequestError as error:
            self.meter.refused(error)
            self._call_soon(partial(self._refuse, request.request_id, error))

    def _call_soon(self, action: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed: nobody is left to hear
            self._closing = True
