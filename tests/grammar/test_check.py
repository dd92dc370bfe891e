"""The process that tries grammars: asked once for each, replaced when it dies or hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from tests.api.conftest import TOKENIZER
from torchweave_ray.errors import InvalidRequest, Unavailable
from torchweave_ray.tokenizer import grammar_check
from torchweave_ray.tokenizer.grammar import GrammarSpec, choice_spec
from torchweave_ray.tokenizer.grammar_check import GrammarChecker

BOMB = GrammarSpec("grammar", "start: " + "a " * 30_000 + '\na: "x"?')


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(TOKENIZER.to_json(), 300, (2,))
    yield checker
    checker.close()


def test_each_grammar_is_tried_once(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    exchange = grammar_check._exchange

    def counted(worker, message):
        asked.append(message.get("text"))
        return exchange(worker, message)

    monkeypatch.setattr(grammar_check, "_exchange", counted)

    async def ask() -> None:
        first, second = choice_spec(["a"]), GrammarSpec("regex", "(a")
        grammars = await asyncio.gather(*(checker.check(first) for _ in range(5)))
        assert len(set(grammars)) == 1
        for _ in range(3):
            with pytest.raises(InvalidRequest):
                await checker.check(second)

    asyncio.run(ask())
    assert asked == [None, '["a"]', "(a"]


def test_whoever_leaves_first_does_not_disturb_the_next(checker: GrammarChecker) -> None:
    async def ask() -> str:
        leaving = asyncio.create_task(checker.check(BOMB))
        await asyncio.sleep(0)
        leaving.cancel()
        return await checker.check(choice_spec(["b"]))

    assert '"b"' in asyncio.run(ask()).replace("\\", "")


def test_a_worker_that_dies_is_replaced(checker: GrammarChecker) -> None:
    async def ask() -> None:
        await checker.check(choice_spec(["a"]))
        worker = checker._worker
        assert worker is not None
        worker.kill()
        worker.wait()
        await checker.check(choice_spec(["b"]))
        assert checker._worker is not worker

    asyncio.run(ask())


def test_a_worker_that_hangs_is_an_outage_not_a_wait(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        await checker.check(choice_spec(["a"]))
        assert checker._worker is not None
        os.kill(checker._worker.pid, signal.SIGSTOP)
        monkeypatch.setattr(grammar_check, "_ANSWER_WITHIN_S", 0.05)
        with pytest.raises(Unavailable):
            await checker.check(choice_spec(["b"]))
        monkeypatch.undo()
        await checker.check(choice_spec(["b"]))

    asyncio.run(ask())


def test_a_tokenizer_that_cannot_be_used_refuses_by_name() -> None:
    checker = GrammarChecker(TOKENIZER.to_json(), 300, ())
    with pytest.raises(InvalidRequest, match="no end token"):
        asyncio.run(checker.check(choice_spec(["a"])))
    checker.close()
