"""Grammars that are nearly right: refused in our own words, or a matcher that answers in time."""

from __future__ import annotations

import asyncio
import json
import random
import time

import numpy as np
import pytest
from llguidance import LLMatcher

from tests.fuzz.mutation import mutated, mutated_bytes
from tests.grammar.schemas import random_schema
from tests.tiny import make_tokenizer
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.tokenizer.grammar import GrammarCompiler, GrammarSpec, make_vocabulary
from torchweave_ray.tokenizer.grammar_check import GrammarChecker

VOCAB, EOS = 300, 2
STEPS = 24
STEP_S = 2.0
"""Far more than a mask takes; a busy machine may add to it."""
KEYWORDS = (
    *({"type": "integer", "minimum": 3}, {"type": ["string", "null"]}, {"$ref": "#"}),
    *({"pattern": "^(a|b)*c$"}, {"format": "date-time"}, {"allOf": [{}, {"type": "array"}]}),
    *({"oneOf": [{"const": 1}]}, {"not": {}}, {"minLength": 5, "maxLength": 2}),
    *({"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}, {"multipleOf": 0.3}),
)
TEXTS = {
    "regex": (r"[a-z]{2,5}(\d+|x?)*", r"(?i)\bfoo\b|^[^\x00-\x1f]+$", r"a{1,100}(b|(c|d){3}){2}"),
    "grammar": (
        'start: item ("," item)*\nitem: NAME | "(" start ")"\nNAME: /[a-z]+/\n%ignore " "\n',
        'root ::= "a" ws ("b" | [0-9]+)*\nws ::= [ \\t\\n]*\n',
        'start: "x" start "y" | ""\n',
    ),
    "choice": ('["yes", "no", "größe"]',),
}


def make_spec(rng: random.Random) -> GrammarSpec:
    if rng.random() < 0.6:
        schema = mutated(random_schema(rng, 2), rng, KEYWORDS)
        return GrammarSpec("json_schema", json.dumps(schema)[:60_000])
    kind = rng.choice(("regex", "grammar", "choice"))
    text = mutated_bytes(rng.choice(TEXTS[kind]).encode(), rng, ()).decode(errors="replace")
    return GrammarSpec(kind, text)  # type: ignore[arg-type]


async def ask_all(seed: int, num: int) -> tuple[int, list[str]]:
    """How many were usable, and what went wrong."""
    tokenizer_json = make_tokenizer(VOCAB).to_str()
    checker = GrammarChecker(tokenizer_json, VOCAB, (EOS,))
    compiler = GrammarCompiler(lambda: make_vocabulary(tokenizer_json, VOCAB, (EOS,)))
    num_usable = 0
    problems = []
    try:
        for number in range(num):
            rng = random.Random(f"grammars {seed} {number}")
            try:
                spec = make_spec(rng)
                grammar = await checker.check(spec)
            except InvalidRequest:
                continue
            except Exception as error:
                problems.append(f"{number}: {error!r} {spec.kind} {spec.text[:300]}")
                continue
            num_usable += 1
            if (problem := _walk(compiler.compile(grammar).deep_copy(), rng)) is not None:
                problems.append(f"{number}: {problem} {spec.kind} {spec.text[:300]}")
    finally:
        checker.close()
    return num_usable, problems


def _walk(matcher: LLMatcher, rng: random.Random) -> str | None:
    """As an engine does: a mask, one of its tokens. It ends by itself, or an error ends it."""
    for step in range(STEPS):
        started = time.perf_counter()
        mask = matcher.compute_bitmask()
        if (seconds := time.perf_counter() - started) > STEP_S:
            return f"{seconds:.1f} s for the mask of step {step}"
        if matcher.is_stopped() or matcher.is_error():
            return None
        words = np.frombuffer(mask, dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(words, bitorder="little")[:VOCAB])
        if not len(allowed):
            return f"nothing is allowed at step {step}"
        if not matcher.consume_token(int(rng.choice(list(allowed)))):
            if matcher.is_error():  # a limit: the engine ends that sequence
                return None
            return f"an allowed token is refused at step {step}: {matcher.get_error()[:200]}"
    return None


def test_a_few() -> None:
    num_usable, problems = asyncio.run(ask_all(1, 150))
    assert not problems
    assert num_usable > 30, "else nearly nothing is tried"


@pytest.mark.slow
def test_many() -> None:
    _, problems = asyncio.run(ask_all(2, 10_000))
    assert not problems
