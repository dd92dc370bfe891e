"""Rank 0's side of the others: started, told what to do, watched, and ended together.

One that dies, fails or falls silent ends them all: what waits for it is broken off at once, and
`check` says why from then on. Knows no steps.
"""

from __future__ import annotations

import hmac
import logging
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from torchweave_ray.errors import ArtifactError, ConfigError, EngineDead
from torchweave_ray.parallel.channel import HOST, Channel, Message
from torchweave_ray.parallel.collectives import Collectives
from torchweave_ray.parallel.launch import Launcher, RankProcess, Summons

logger = logging.getLogger(__name__)

START_S = 180.0
"""For all processes to come: an interpreter, torch, under Ray an actor."""
BEAT_S = 1.0
INTERRUPTED = "a step was interrupted, and its ranks cannot know how far it came: start anew"
SILENT_S = 15.0
"""A rank that shows no sign of life for so long counts as dead."""
_HELLO_S = 5.0
_NOTICE_S = 3.0
"""How long after an error here it may take until it is known which rank caused it."""
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ConfigError, ArtifactError, torch.OutOfMemoryError)
}
"""Errors that a rank answers a call with, and may go on after."""


class Ranks:
    """Ranks 1 .. n - 1. One thread calls, any thread may `check`."""

    def __init__(
        self, launcher: Launcher, collectives: Collectives, devices: Sequence[str] | None
    ) -> None:
        """`devices`: names of GPUs for ranks 0, 1, ...; None: the launcher knows. Raises
        ConfigError if a process cannot be started."""
        self._collectives = collectives
        self._processes: dict[int, RankProcess] = {}
        self._channels: dict[int, Channel] = {}
        self._replies: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()
        self._why: str | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._is_closing = False
        try:
            self._start(launcher, devices)
        except BaseException:
            self._kill()
            raise
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def tell(self, do: str, **what: Any) -> None:
        """Without an answer. Raises EngineDead if a rank is gone."""
        self.check()
        for rank, channel in self._channels.items():
            try:
                channel.send({"do": do, **what})
            except OSError as error:
                raise self.failure(error, f"rank {rank} is gone") from error
            except BaseException:  # Ctrl-C: some have heard of it, others not
                self.end(INTERRUPTED)
                raise

    def answers(self) -> list[Message]:
        """Of all to what they were told last, in order of rank. Raises what the first one answered
        that could not do it, EngineDead if one is gone."""
        found: dict[int, Message] = {}
        while len(found) < len(self._channels):
            answer = self._replies.get()
            if answer is None:
                self._replies.put(None)
                self.check()
                raise EngineDead("the ranks were closed")
            found[answer[0]] = answer[1]
        for rank, message in sorted(found.items()):
            if "error" in message:
                kind = _KINDS[message["kind"]]
                raise kind(f"rank {rank}: {message['error']}")
        return [message for _, message in sorted(found.items())]

    def call(self, do: str, **what: Any) -> list[Message]:
        self.tell(do, **what)
        return self.answers()

    def join(self) -> None:
        """All meet for their first collective."""
        store = self._collectives.open_store()
        self.tell("join", port=store.port)
        try:
            self._collectives.join(store.port)
        except RuntimeError as error:
            raise self.failure(error, "the ranks did not meet") from error
        self.answers()

    def check(self) -> None:
        """Raises EngineDead, saying why, once a rank is gone."""
        if self._why is not None:
            raise EngineDead(self._why)

    def failure(self, error: BaseException, what: str) -> EngineDead:
        """What to raise when something here went wrong, most likely because a rank is gone; from
        now on none is of use."""
        if not self._ended.wait(_NOTICE_S):
            self.end(f"{what}: {error!r}")
        return EngineDead(self._why or what)

    def end(self, why: str) -> None:
        """Of all of them, at once: they do not know where the others stand. Any thread may call."""
        with self._lock:
            if self._why is not None or self._is_closing:
                return
            self._why = why
        logger.error("[Ranks] %s", why)
        self._kill()
        self._collectives.abort()
        self._ended.set()
        self._replies.put(None)

    def close(self) -> None:
        with self._lock:
            is_first, self._is_closing = not self._is_closing, True
        if not is_first:
            return
        self._kill()  # they have nothing to bring to an end
        self._replies.put(None)
        self._watcher.join()
        self._collectives.abort()
        for channel in self._channels.values():
            channel.close()

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()

    def _start(self, launcher: Launcher, devices: Sequence[str] | None) -> None:
        started_at = time.monotonic()
        key = secrets.token_hex(16)
        with socket.create_server((HOST, 0)) as server:
            port = server.getsockname()[1]
            for rank in range(1, self._collectives.num_ranks):
                device = None if devices is None else devices[rank]
                self._processes[rank] = launcher.launch(Summons(rank, port, key), device)
            server.settimeout(0.2)
            while len(self._channels) < len(self._processes):
                self._accept(server, key)
                for rank, process in self._processes.items():
                    if (why := process.why_ended()) is not None:
                        raise ConfigError(f"the process of rank {rank} ended at its start: {why}")
                if time.monotonic() - started_at > START_S:
                    missing = sorted(set(self._processes) - set(self._channels))
                    raise ConfigError(f"ranks {missing} did not start within {START_S:.0f} s")

    def _accept(self, server: socket.socket, key: str) -> None:
        try:
            connected, _ = server.accept()
        except TimeoutError:
            return
        connected.settimeout(_HELLO_S)
        channel = Channel(connected)
        hello = channel.receive()
        connected.settimeout(None)
        hello = hello if isinstance(hello, dict) else {}
        if hmac.compare_digest(str(hello.get("key")), key):
            self._channels[hello["rank"]] = channel
        else:
            channel.close()

    def _watch(self) -> None:
        try:
            self._listen()
        except Exception as error:  # nobody would hear of a death any more
            self.end(f"watching the ranks failed: {error!r}")

    def _listen(self) -> None:
        heard_at = dict.fromkeys(self._channels, time.monotonic())
        files = selectors.DefaultSelector()
        for rank, channel in self._channels.items():
            files.register(channel, selectors.EVENT_READ, rank)
        while self._why is None:
            for file, _ in files.select(BEAT_S):
                rank = file.data
                heard_at[rank] = time.monotonic()
                message = self._channels[rank].receive()
                if message is None:
                    if self._is_closing:
                        return
                    self.end(self._why_gone(rank))
                    return
                self._take(rank, message)
            for rank, moment in heard_at.items():
                silent_s = time.monotonic() - moment
                if silent_s > SILENT_S:
                    self.end(f"rank {rank} has shown no sign of life for {silent_s:.0f} s")

    def _take(self, rank: int, message: Message) -> None:
        if "failed" in message:
            self.end(f"rank {rank} failed: {message['failed']}")
        elif "beat" not in message:
            self._replies.put((rank, message))

    def _why_gone(self, rank: int) -> str:
        """Its connection ends a moment before the process does."""
        for _ in range(100):
            if (why := self._processes[rank].why_ended()) is not None:
                return f"rank {rank} died: {why}"
            time.sleep(0.01)
        return f"rank {rank} closed its connection"
