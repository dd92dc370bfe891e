"""Clients that read seeded streams, over and over, and compare each with the undisturbed one. They
go on by themselves when their stream is lost. No test in here."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.serve.cluster import wait_until
from torchweave_ray.client import stream

Body = dict[str, Any]
PATIENCE_S = 60.0


def bodies(dice: random.Random, count: int) -> list[Body]:
    """Seeded draws of some length, greedy ones, two choices: all that resumes."""
    return [
        {
            "prompt": "".join(dice.choices("abcdefgh ", k=dice.randint(3, 200))),
            "max_tokens": dice.randint(150, 500),
            "ignore_eos": True,
            "seed": dice.randrange(2**31),
            "temperature": dice.choice([0, 0.7, 1.0]),
            "n": dice.choice([1, 1, 1, 2]),
        }
        for _ in range(count)
    ]


def read(url: str, body: Body) -> tuple[list[str], float]:
    """The text of every choice, and the longest wait for a next event in seconds."""
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    texts, pause, numbers, usage, data = [""] * body["n"], 0.0, [], None, ""
    last = 0.0
    for event in stream(url, "/v1/completions", asked, patience_s=PATIENCE_S):
        now = time.monotonic()
        last, pause = now, max(pause, now - (last or now))
        data = event.data
        assert event.id, f"it ended with {data}"
        numbers.append(int(event.id.split(":")[1]))
        if data != "[DONE]":
            chunk = json.loads(data)
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
    assert data == "[DONE]"
    assert numbers == [*range(1, len(numbers) + 1)]
    assert usage is not None
    assert usage["completion_tokens"] == body["n"] * body["max_tokens"]
    return texts, pause


@dataclass
class Load:
    url: str
    num_clients: int
    expected: list[tuple[Body, list[str]]]
    seed: int
    pauses: list[float] = field(default_factory=list)
    """Of each stream that has been read, its longest."""
    faults: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for i in range(self.num_clients):
            thread = threading.Thread(target=self._run, args=(random.Random(self.seed + i),))
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"

    @property
    def num_streams(self) -> int:
        return len(self.pauses)

    def go_on(self, num_streams: int) -> None:
        """Until so many more have been read."""
        reached = self.num_streams + num_streams
        wait_until(lambda: self.num_streams >= reached)

    def _run(self, dice: random.Random) -> None:
        while not self._stop.is_set():
            body, expected = dice.choice(self.expected)
            pause = 0.0
            try:
                texts, pause = read(self.url, body)
                if texts != expected:
                    self.faults.append(f"other text: {texts} for {expected}: {body}")
            except Exception as error:
                self.faults.append(f"{error!r}: {body}")
            self.pauses.append(pause)
