"""`RayBackend` over fake handles and a real bus: whatever breaks, clients get the whole text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from deployments.backend.fleet import Fleet
from deployments.backend.ray_backend import RayBackend
from deployments.bus.listener import BusListener
from deployments.bus.sender import BusError, BusSender, OutgoingStream
from deployments.calls import BusFailed, CallResult, Description, EngineFailed, Finished
from tests.serve.test_bus import run
from torchweave_ray.errors import ModelNotFound, Overloaded, Unavailable
from torchweave_ray.outputs import (
    ChoiceDelta,
    FinishReason,
    GenerateRequest,
    OutputKind,
    RequestOutput,
    Usage,
)
from torchweave_ray.sampling_params import SamplingParams

LENGTH = 6


def token(seed: int, index: int) -> int:
    return (seed * 7919 + index * 104729) % 1000


def text_of(seed: int, length: int = LENGTH) -> str:
    return "".join(f"<{token(seed, i)}>" for i in range(length))


def steps(request: GenerateRequest) -> list[RequestOutput]:
    """What an engine would give: one token a choice a step, resumed where the request says."""
    start = len(request.output_token_ids)
    outputs = []
    for position in range(start, LENGTH):
        deltas = []
        for index in range(request.n):
            seed = request.sampling.seed + index
            text = text_of(seed, position + 1)[request.emitted_chars :]
            if position > start:
                text = f"<{token(seed, position)}>"
            finish = FinishReason.LENGTH if position == LENGTH - 1 else None
            deltas.append(
                ChoiceDelta(index, position, (token(seed, position),), text, finish_reason=finish)
            )
        outputs.append(RequestOutput(request.request_id, tuple(deltas)))
    usage = Usage(len(request.prompt_token_ids), request.n * LENGTH, 0)
    return [*outputs, RequestOutput(request.request_id, usage=usage)]


@dataclass
class Fault:
    """`at`: outputs before it happens; `times`: in so many attempts."""

    act: Callable[[Replica], Any]
    at: int
    times: int = 1


class Response:
    def __init__(self, items: AsyncGenerator[Any]) -> None:
        self._items = items
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    def __await__(self) -> Any:
        return anext(self._items).__await__()

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Replica:
    """Answers as a replica does, on the same loop."""

    sender: BusSender
    faults: list[Fault] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    by_bus: int = 0
    step_s: float = 0.0
    descriptions: list[Description] = field(default_factory=list)
    """What all replicas say when they are asked what they are."""
    fleet: Fleet = field(default_factory=lambda: Fleet(lambda: frozenset({"r1"}), 1.0))

    def check(self, done: int) -> Any:
        for fault in self.faults:
            if fault.at == done and fault.times > 0:
                fault.times -= 1
                return fault.act(self)
        return None

    async def ask_all(self, method: str) -> list[Description]:
        assert method == "describe"
        return self.descriptions

    async def call(self, request: GenerateRequest, stream_id: int) -> AsyncGenerator[CallResult]:
        assert request.delivery is not None
        lost = asyncio.Event()
        try:
            out = await self.sender.open(request.delivery, stream_id, lost.set)
        except BusError as error:
            yield BusFailed(str(error))
            return
        self.by_bus += 1
        for done, output in enumerate(steps(request)):
            if lost.is_set():
                yield BusFailed("lost")
                return
            if (result := self.check(done)) is not None:
                yield result
                return
            self.deliver(out, output)
            await asyncio.sleep(self.step_s)
        usage = steps(request)[-1].usage
        assert usage is not None
        yield Finished(out.num_entries, usage, None)

    def deliver(self, out: OutgoingStream, output: RequestOutput) -> None:
        out.send(output)
        self.sender.flush()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Any]:
        yield self.sender.alive
        for done, output in enumerate(steps(request)):
            if (result := self.check(done)) is not None:
                yield result
                return
            yield output
            await asyncio.sleep(0)

    @dataclass
    class Method:
        replica: Replica
        call: Callable[..., AsyncGenerator[Any]]

        def remote(self, request: GenerateRequest, *args: Any) -> Response:
            self.replica.requests.append(request)
            self.replica.responses.append(Response(self.call(request, *args)))
            return self.replica.responses[-1]

    @property
    def generate(self) -> Method:
        return self.Method(self, self.call)

    @property
    def generate_stream(self) -> Method:
        return self.Method(self, self.stream)


def die(_: Replica) -> None:
    raise ActorUnavailableError("gone", b"\0" * 16)


def cut(replica: Replica) -> None:
    """The connection breaks; the call itself goes on."""
    for connection in list(replica.sender._connections.values()):
        connection.drop("cut")


def engine_dies(_: Replica) -> EngineFailed:
    return EngineFailed("the engine thread has died")


@asynccontextmanager
async def serving(
    *faults: Fault, use_bus: bool = True, secret: str | None = None
) -> AsyncIterator[tuple[RayBackend, Replica]]:
    listener, sender = BusListener(), BusSender("replica")
    await listener.start("127.0.0.1")
    if secret is not None:
        listener._address = replace(listener.address, secret=secret)
    replica = Replica(sender, list(faults))
    client: Any = replica
    try:
        yield RayBackend({"m": client}, listener if use_bus else None, resume_wait_s=0.0), replica
    finally:
        await sender.stop()
        await listener.stop()
        assert not listener.streams
        assert all(response.cancelled for response in replica.responses)


def request(n: int = 1, **more: Any) -> GenerateRequest:
    return GenerateRequest("r", "m", (1, 2, 3), SamplingParams(seed=5), n=n, **more)


async def collect(
    backend: RayBackend, wanted: GenerateRequest
) -> tuple[dict[int, str], list[RequestOutput]]:
    outputs = [output async for output in backend.generate(wanted)]
    texts: dict[int, str] = {}
    for output in outputs:
        assert output.request_id == wanted.request_id
        for delta in output.deltas:
            texts[delta.index] = texts.get(delta.index, "") + delta.text
    assert [output.is_last for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return texts, outputs


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_undisturbed(n: int, use_bus: bool) -> None:
    async def body() -> None:
        async with serving(use_bus=use_bus) as (backend, replica):
            texts, outputs = await collect(backend, request(n))
            assert texts == {i: text_of(5 + i) for i in range(n)}
            assert outputs[-1].usage == Usage(3, n * LENGTH, 0)
            assert replica.by_bus == int(use_bus)
            assert len(replica.requests) == 1

    run(body())


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("at", range(LENGTH + 1))
@pytest.mark.parametrize("act", [die, cut, engine_dies], ids=lambda act: act.__name__)
@pytest.mark.parametrize("use_bus", [True, False], ids=["bus", "handle"])
def test_loss_after_every_token(n: int, at: int, act: Any, use_bus: bool) -> None:
    async def body() -> None:
        async with serving(Fault(act, at, times=2), use_bus=use_bus) as (backend, _):
            texts, outputs = await collect(backend, request(n))
            assert texts == {i: text_of(5 + i) for i in range(n)}
            assert outputs[-1].usage == Usage(3, n * LENGTH, 0)

    run(body())


def test_resumed_choices_ask_only_for_what_is_missing() -> None:
    async def body() -> None:
        async with serving(Fault(die, 3)) as (backend, replica):
            replica.step_s = 0.005  # a frame that is still on its way would be asked for again
            await collect(backend, request(2))
            first, *rest = replica.requests
            assert first.delivery is not None
            assert [(r.n, r.sampling.seed, r.delivery) for r in rest] == [
                (1, 5, None),
                (1, 6, None),
            ]
            for i, resumed in enumerate(rest):
                assert resumed.output_token_ids == tuple(token(5 + i, k) for k in range(3))
                assert resumed.emitted_chars == len(text_of(5 + i, 3))
            assert len({r.request_id for r in replica.requests}) == 3

    run(body())


def test_unreachable_bus_falls_back_to_the_handle() -> None:
    async def body() -> None:
        async with serving(secret="x" * 32) as (backend, replica):
            address = backend._bus.address if backend._bus else None
            assert address is not None
            await replica.sender.stop()
            blocked = replace(address, port=1)
            assert backend._bus is not None
            backend._bus._address = blocked
            texts, _ = await collect(backend, request())
            assert texts == {0: text_of(5)}
            assert replica.by_bus == 0

    run(body())


def test_frames_that_come_after_the_return_are_waited_for() -> None:
    async def body() -> None:
        async with serving() as (backend, replica):
            loop = asyncio.get_running_loop()

            def late(out: OutgoingStream, output: RequestOutput) -> None:
                out.num_entries += bool(output.deltas)
                inner = OutgoingStream(out.id, out._connection)
                loop.call_later(0.05, Replica.deliver, replica, inner, output)

            replica.deliver = late  # type: ignore[method-assign]
            texts, _ = await collect(backend, request())
            assert texts == {0: text_of(5)}
            assert len(replica.requests) == 1

    run(body())


def test_refusals_keep_their_type() -> None:
    async def body() -> None:
        refusal = Overloaded("busy", None, None, 3.0)
        for use_bus in (True, False):
            async with serving(Fault(lambda _: refusal, 0), use_bus=use_bus) as (backend, _):
                with pytest.raises(Overloaded) as caught:
                    await collect(backend, request())
                assert caught.value.retry_after == 3.0
        async with serving() as (backend, _):
            with pytest.raises(ModelNotFound, match="there is m"):
                await collect(backend, replace(request(), model="other"))

    run(body())


def test_it_gives_up_in_the_end() -> None:
    async def body() -> None:
        async with serving(Fault(die, 0, times=100)) as (backend, _):
            with pytest.raises(Unavailable, match="lost"):
                await collect(backend, request())

    run(body())


def test_only_token_streams_resume_in_the_middle() -> None:
    async def body() -> None:
        wanted = request(output_kind=OutputKind.PROMPT_LOGPROBS)
        async with serving(Fault(die, 0)) as (backend, _):
            await collect(backend, wanted)
        async with serving(Fault(die, 1)) as (backend, _):
            with pytest.raises(Unavailable):
                await collect(backend, wanted)

    run(body())


def test_leaving_early_cancels_the_call() -> None:
    async def body() -> None:
        for use_bus in (True, False):
            async with serving(use_bus=use_bus) as (backend, replica):
                outputs = backend.generate(request())
                await anext(outputs)
                await outputs.aclose()
                assert [response.cancelled for response in replica.responses] == [True]

    run(body())


def test_chunks_merge_when_paced_but_the_first_token_goes_at_once() -> None:
    async def body() -> None:
        async with serving() as (backend, replica):
            replica.step_s = 0.01
            backend._chunk_interval_s = 0.05
            texts, outputs = await collect(backend, request())
            assert texts == {0: text_of(5)}
            assert len(outputs[0].deltas[0].token_ids) == 1
            assert len(outputs) < LENGTH

    run(body())
