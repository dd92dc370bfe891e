"""What reading a stream costs the client: ours, httpx and aiohttp on the same server-sent chunks.

Backs the choice of torchweave_ray/bench/load/http_client.py; needs aiohttp and httpx. Run it with
`--save` to write a results file.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import aiohttp
import httpx
import uvloop

from torchweave_ray.bench.load.http_client import Connection
from torchweave_ray.bench.origin import save_results

STREAMS, REQUESTS, CHUNKS, INTERVAL_S = 16, 48, 128, 0.01
EVENT = b'data: {"id":"cmpl-%s","choices":[{"index":0,"text":" word"}]}\n\n' % (b"0" * 100)
PIECE = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
Once = Callable[[], Awaitable[int]]
Client = Callable[[str], AbstractAsyncContextManager[Once]]


def serve(listener: socket.socket) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for _ in range(CHUNKS):
            writer.write(PIECE)
            await asyncio.sleep(INTERVAL_S)
        writer.write(b"0\r\n\r\n")
        writer.close()

    async def main() -> None:
        await (await asyncio.start_server(answer, sock=listener)).serve_forever()

    asyncio.run(main())


@asynccontextmanager
async def ours(url: str) -> AsyncIterator[Once]:
    async def once() -> int:
        return len((await Connection(url).request("POST", "/", b"{}")).chunks)

    yield once


@asynccontextmanager
async def with_httpx(url: str) -> AsyncIterator[Once]:
    async with httpx.AsyncClient() as client:

        async def once() -> int:
            async with client.stream("POST", url, content=b"{}") as answer:
                return sum([line.startswith("data:") async for line in answer.aiter_lines()])

        yield once


@asynccontextmanager
async def with_aiohttp(url: str) -> AsyncIterator[Once]:
    async with aiohttp.ClientSession() as session:

        async def once() -> int:
            async with session.post(url, data=b"{}") as answer:
                return sum([line.startswith(b"data:") async for line in answer.content])

        yield once


async def measure(client: Client, url: str) -> float:
    """CPU microseconds a chunk."""
    work = iter(range(REQUESTS))
    counts: list[int] = []

    async def loop(once: Once) -> None:
        for _ in work:
            counts.append(await once())

    async with client(url) as once:
        started = time.process_time()
        await asyncio.gather(*(loop(once) for _ in range(STREAMS)))
        return 1e6 * (time.process_time() - started) / sum(counts)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = multiprocessing.get_context("fork").Process(target=serve, args=(listener,))
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        points = []
        try:
            for loop, factory in (("asyncio", None), ("uvloop", uvloop.new_event_loop)):
                for client in (ours, with_httpx, with_aiohttp):
                    with asyncio.Runner(loop_factory=factory) as runner:
                        cost = runner.run(measure(client, url))
                    name = client.__name__.removeprefix("with_")
                    points.append({"client": name, "loop": loop, "cpu_us_per_chunk": round(cost)})
                    print(points[-1])
        finally:
            server.terminate()
    if "--save" in sys.argv:
        config = {"streams": STREAMS, "chunks": CHUNKS, "interval_s": INTERVAL_S}
        print(save_results("client-cost", config, points))


if __name__ == "__main__":
    main()
