"""Calls that are nearly right: a 4xx or an answer, in time, and an empty engine afterwards."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.calls import BODIES, Call, Fuzzed, ask_all

MANY = 20_000


def test_the_bodies_are_right_before_they_are_changed() -> None:
    """Else all that is asked is refused at the door. Only the echo model has no grammars."""

    async def ask() -> None:
        fuzzed = Fuzzed()
        fuzzed.engine.start()
        try:
            for path, bodies in BODIES.items():
                for body in bodies:
                    content = json.dumps(body).encode()
                    headers = [(b"content-type", b"application/json")]
                    status, text = await fuzzed.ask(Call("POST", path, headers, content))
                    assert status == 200 or b"output is not available here" in text, text
        finally:
            fuzzed.engine.close()

    asyncio.run(ask())


def test_a_few() -> None:
    problems: list[str] = []
    asyncio.run(ask_all(1, range(1000), problems.append))
    assert not problems


@pytest.mark.slow
def test_many() -> None:
    command = [sys.executable, "-m", "tests.fuzz.calls", "--num", str(MANY)]
    ended = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
