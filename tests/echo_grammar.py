"""Grammars over the echo model's letters, and their brute-force meaning: no test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from tests.echo import EOS, VOCAB, AllowedNext, allowed_tokens, letter
from torchweave_ray.tokenizer.grammar import GrammarCompiler, GrammarSpec

REGEXES = (
    "(ab|c)+d{0,3}e",
    "[a-e]{1,12}",
    "a*b*c*d*e*",
    "((a|bb)(c|dd)?){2,9}",
    "a{3,40}",
    "abcde",
)


class _Letters:
    """The vocabulary of `letter` as llguidance asks for one."""

    eos_token_id = EOS
    bos_token_id = None
    special_token_ids = (EOS,)
    tokens = tuple(letter(i).encode() or b"<end>" for i in range(VOCAB))

    def __call__(self, text: bytes) -> list[int]:
        """Greedy; ends where no token goes on."""
        ids: list[int] = []
        while text[:1] in (b"a", b"b", b"c", b"d", b"e"):
            longest = max(
                (i for i in range(VOCAB) if i != EOS and text.startswith(self.tokens[i])),
                key=lambda i: len(self.tokens[i]),
            )
            ids.append(longest)
            text = text[len(self.tokens[longest]) :]
        return ids


def make_letters() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Letters()), n_vocab=VOCAB, eos_token=[EOS])


def letter_compiler() -> GrammarCompiler:
    return GrammarCompiler(make_letters)


def regex(text: str) -> str:
    return GrammarSpec("regex", text).llguidance()


class Meaning:
    """What may follow, each time from the start of the grammar: no state to go wrong."""

    def __init__(self) -> None:
        self._letters = make_letters()
        self._known: dict[tuple[str, tuple[int, ...]], frozenset[int]] = {}

    def of(self, grammar: str) -> AllowedNext:
        def allowed(output: Sequence[int]) -> frozenset[int]:
            key = (grammar, tuple(output))
            if key not in self._known:
                matcher = LLMatcher(self._letters, grammar, log_level=0)
                assert matcher.consume_tokens(list(output)) or not output
                mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)
                self._known[key] = allowed_tokens(mask)
            return self._known[key]

        return allowed
