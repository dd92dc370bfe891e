"""Clients that ask again as soon as they are answered, over connections they keep. No test."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PAUSE_S = 0.05
"""Of a client that was told to come back: as short as they come."""


@dataclass
class ClosedLoop:
    """`num` clients; `expected`: the text of a prompt, by prompt."""

    port: int
    expected: dict[str, str]
    num: int
    body: dict[str, Any]
    outcomes: Counter[str] = field(default_factory=Counter)
    """complete, refused (no connection), 503, and what should not be."""
    others: set[tuple[str, str]] = field(default_factory=set)
    """(prompt, text) of whole answers that were not the expected ones."""

    def __enter__(self) -> ClosedLoop:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(self.num)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    @property
    def faults(self) -> dict[str, int]:
        return {k: n for k, n in self.outcomes.items() if k not in ("complete", "refused", "503")}

    def _run(self, number: int) -> None:
        prompts = list(self.expected)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=50)
        for turn in range(1_000_000):
            if self._stop.is_set():
                break
            prompt = prompts[(number + turn) % len(prompts)]
            outcome = self._ask(connection, prompt)
            self.outcomes[outcome] += 1
            if outcome != "complete":
                time.sleep(PAUSE_S)
            if outcome not in ("complete", "503"):  # who is refused keeps what he has been left
                connection.close()
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, prompt: str) -> str:
        body = {"prompt": prompt, "stream": True, "temperature": 0, **self.body}
        try:
            if connection.sock is None:
                connection.connect()
        except OSError:
            return "refused"
        try:
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):
            return "refused"  # not a byte of an answer: it is safe to ask again
        try:
            raw = response.read().decode()
        except (TimeoutError, http.client.HTTPException, OSError) as error:
            return f"{response.status} cut: {error!r}"
        if response.status == 503:
            return _refusal(response, raw)
        if response.status != 200:
            return f"{response.status}: {raw[:200]}"
        events = [line.removeprefix("data: ") for line in raw.splitlines() if "data: " in line]
        if events[-1:] != ["[DONE]"]:
            return f"incomplete: {raw[-200:]}"
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        if text == self.expected[prompt]:
            return "complete"
        self.others.add((prompt, text))
        return "another text"


def _refusal(response: http.client.HTTPResponse, raw: str) -> str:
    """503 of one that says why, and when to come back."""
    seconds = response.getheader("Retry-After") or ""
    if not seconds.isdigit() or int(seconds) < 1:
        return f"503, Retry-After {seconds!r}: {raw[:200]}"
    try:
        error = json.loads(raw)["error"]
    except (ValueError, KeyError, TypeError):
        return f"503 without an error: {raw[:200]}"
    if error["code"] != "draining" or "shutting down" not in error["message"]:
        return f"503 for another reason: {error}"
    return "503"
