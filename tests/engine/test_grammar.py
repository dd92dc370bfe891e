"""Sequences under a grammar on EchoRunner: who fails, who is refused, who waits for nobody."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer
from tests.echo_grammar import letter_compiler, make_letters, regex
from tests.engine.test_async_engine import INFO
from torchweave_ray.config import CacheConfig, SchedulerConfig
from torchweave_ray.engine import grammar as engine_grammar
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import FinishReason, GenerateRequest, OutputKind
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer.grammar import GrammarCompiler, make_vocabulary

LIMITS = RuntimeLimits(64, 4, 120, VOCAB, (EOS,))
LETTERS = regex("[a-e]{4,20}")


def make_engine(grammars: GrammarCompiler | None) -> tuple[Engine, EchoRunner]:
    runner = EchoRunner(LIMITS)
    engine = Engine(
        runner, LetterDetokenizer(), CacheConfig(), SchedulerConfig(), "a", grammars=grammars
    )
    return engine, runner


def make_request(name: str, grammar: str | None = LETTERS, **fields) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=16, seed=3, ignore_eos=grammar is None)
    return GenerateRequest(name, "echo", (1, 2, 3), sampling, grammar=grammar, **fields)


def run(engine: Engine) -> dict[str, tuple[FinishReason | None, str | None]]:
    """By request: why it ended, and its error."""
    ends = {}
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                if delta.finish_reason is not None:
                    ends[output.request_id] = delta.finish_reason, delta.error
        engine.check_integrity()
    return ends


def test_without_a_grammar_no_plan_has_a_bitmask() -> None:
    engine, runner = make_engine(letter_compiler())
    engine.add(make_request("first"))
    engine.add(make_request("plain", None))
    ends = run(engine)
    assert ends == {"first": (FinishReason.STOP, None), "plain": (FinishReason.LENGTH, None)}
    assert runner.plans[0].bitmask is not None
    runner.plans.clear()
    engine.add(make_request("later", None))
    run(engine)
    assert all(plan.bitmask is None for plan in runner.plans)


def test_a_grammar_that_takes_too_long_ends_its_own_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_grammar, "MAX_MASK_S", 0.0)
    engine, _ = make_engine(letter_compiler())
    engine.add(make_request("slow", n=1))
    engine.add(make_request("plain", None))
    ends = run(engine)
    assert ends["slow"] == (FinishReason.ERROR, "the grammar takes more than 0 s a token")
    assert ends["plain"] == (FinishReason.LENGTH, None)


def test_resuming_with_other_tokens_than_the_grammar_has_ends_in_an_error() -> None:
    engine, _ = make_engine(letter_compiler())
    engine.add(make_request("wrong", regex("a{3,9}"), output_token_ids=(1,)))
    ((reason, error),) = run(engine).values()
    assert reason is FinishReason.ERROR
    assert error is not None
    assert error.startswith("the text left its grammar")


@pytest.mark.parametrize(
    ("grammars", "request_"),
    [
        (None, make_request("r")),
        (letter_compiler(), make_request("r", "nonsense")),
        (letter_compiler(), make_request("r", output_kind=OutputKind.POOLED)),
    ],
)
def test_what_can_never_be_served_is_refused(
    grammars: GrammarCompiler | None, request_: GenerateRequest
) -> None:
    engine, _ = make_engine(grammars)
    with pytest.raises(InvalidRequest) as caught:
        engine.add(request_)
    assert caught.value.param == "grammar"
    assert not engine.has_work


def test_a_model_without_an_end_token_is_refused_grammars() -> None:
    engine, _ = make_engine(GrammarCompiler(lambda: make_vocabulary("{}", VOCAB, ())))
    with pytest.raises(InvalidRequest, match="no end token"):
        engine.add(make_request("r"))


def test_streams_go_on_while_a_grammar_is_compiled() -> None:
    may_compile = threading.Event()

    def make_slowly():
        assert may_compile.wait(30)
        return make_letters()

    async def main() -> tuple[bool, FinishReason | None]:
        engine = AsyncEngine(make_engine(GrammarCompiler(make_slowly))[0], INFO)
        engine.start()

        async def whole(request: GenerateRequest) -> FinishReason | None:
            reason = None
            async for output in engine.generate(request):
                for delta in output.deltas:
                    reason = delta.finish_reason or reason
            return reason

        compiling = asyncio.create_task(whole(make_request("constrained")))
        assert await whole(make_request("plain", None)) is FinishReason.LENGTH
        was_waiting = not compiling.done()
        may_compile.set()
        reason = await compiling
        engine.close()
        return was_waiting, reason

    assert asyncio.run(main()) == (True, FinishReason.STOP)
