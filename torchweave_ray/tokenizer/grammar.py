"""What a text may be: a JSON schema, a regex, choices or a Lark/GBNF grammar, for llguidance.

`GrammarSpec` is what somebody wants, its `llguidance` form what a request carries, a matcher what
says which token may come next. Knows no sequences; who asks too much is `grammar_check`'s.
Without llguidance everything but grammars works.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from torchweave_ray.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_CHARS = 64 << 10
JSON_WHITESPACE = r" |\n {0,16}"
"""Between the tokens of JSON. Bounded: small models else go on with blanks until max_tokens."""

_MAX_CACHED = 64
_MAX_ERROR = 300
_LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
"""A mask then takes a few ms at most for all but grammars made to be slow."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What somebody wants a text to be."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    """grammar: Lark as llguidance has it, or llama.cpp's GBNF."""
    text: str
    """json_schema: JSON of the schema; choice: JSON of a list of texts."""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(
                f"a grammar may have {MAX_GRAMMAR_CHARS} characters, this one has {len(self.text)}",
                "grammar",
            )

    def llguidance(self) -> str:
        """The grammar as `GenerateRequest.grammar` carries it; not compiled yet.

        Raises InvalidRequest for param "grammar".
        """
        _need_llguidance()
        from llguidance import LLMatcher, grammar_from

        try:
            if self.kind == "json_schema":
                spaced: Any = {"whitespace_pattern": JSON_WHITESPACE}
                return LLMatcher.grammar_from_json_schema(self.text, defaults=spaced)
            return grammar_from(self.kind, self.text)
        except (ValueError, RecursionError) as error:
            raise invalid_grammar(str(error)) from None


def json_spec(schema: object) -> GrammarSpec:
    """Of a schema as parsed JSON."""
    return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False))


def choice_spec(choices: Sequence[str]) -> GrammarSpec:
    return GrammarSpec("choice", json.dumps(list(choices)))


class GrammarCompiler:
    """Matchers of one model's vocabulary, compiled once for each grammar. Any thread may call."""

    def __init__(self, make_vocabulary: Callable[[], LLTokenizer]) -> None:
        """`make_vocabulary` is called by `warm`, or at the first grammar."""
        self._make_vocabulary = make_vocabulary
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, LLMatcher] = OrderedDict()

    def warm(self) -> None:
        """Make the vocabulary now: a third of a second in which no other Python runs.

        Raises InvalidRequest where there is none, like every `compile` then.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the start of this grammar: copy it, it is shared.

        Takes milliseconds for most and holds no GIL. Raises InvalidRequest for param "grammar".
        """
        key = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
                return found
        self.warm()
        assert self._vocabulary is not None
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise invalid_grammar(matcher.get_error())
        with self._lock:
            self._cache[key] = matcher
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        return matcher


def make_vocabulary(
    tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """`vocab_size` is the width of the logits. Raises InvalidRequest for param "grammar"."""
    if not eos_token_ids:
        raise _unavailable("it has no end token")
    _need_llguidance()
    from llguidance import LLTokenizer

    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:  # llguidance raises nothing narrower
        raise _unavailable(str(error)) from error


def invalid_grammar(reason: str) -> InvalidRequest:
    lines = [line.strip() for line in reason.splitlines() if not line.startswith("<")]
    text = " ".join(line for line in lines if line)
    return InvalidRequest(f"not a usable grammar: {text[:_MAX_ERROR]}", "grammar")


def _need_llguidance() -> None:
    if find_spec("llguidance") is None:
        raise InvalidRequest("structured output needs the package llguidance", "grammar")


def _unavailable(reason: str) -> InvalidRequest:
    return InvalidRequest(f"structured output is not available for this model: {reason}", "grammar")
