"""How one sequence draws its tokens and when it stops. Knows no tensors and no HTTP.

The order in which the sampler applies these is pinned in `runner/sampler.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchweave_ray.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """How long an answer may reason before the tag that ends it is drawn instead.

    What is forced follows from the output's own tokens alone, so forks, recomputed and resumed
    sequences decide alike.
    """

    max_tokens: int
    openers: tuple[tuple[int, ...], ...]
    """How an answer that reasons begins, in every spelling; `((),)`: its prompt began it."""
    closers: tuple[tuple[int, ...], ...]
    """Spellings of the tag that ends the reasoning; the first is the one that is forced."""

    def forced_token(self, output: Sequence[int]) -> int | None:
        """The token that has to follow this output (all of it); None: any may."""
        openers = [len(o) for o in self.openers if tuple(output[: len(o)]) == o]
        if not openers or len(output) < max(openers) + self.max_tokens:
            return None
        start = max(openers)
        if any(_holds(output, spelling, start) for spelling in self.closers):
            return None
        closer = self.closers[0]
        num_begun = range(min(len(closer) - 1, len(output) - start), -1, -1)
        return next(closer[n] for n in num_begun if tuple(output[len(output) - n :]) == closer[:n])


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping of one sequence; `validate` names the field that is wrong."""

    max_tokens: int | None = None
    """Most tokens to generate; None: up to the context length."""
    temperature: float = 1.0
    """0 is greedy (argmax, lowest id on ties)."""
    top_k: int = 0
    """Keep the k likeliest tokens (all that tie with the k-th); 0 keeps all."""
    top_p: float = 1.0
    """Keep a token while the likelier ones together hold less than this share; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, -100..100."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these are drawn; None: any."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output never completes: the last token is not drawn after the
    others."""
    seed: int = 0
    """Choice i of n draws with seed + i; one Philox uniform per (seed, output index)."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before so many output tokens."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    """Stop strings; the text ends before the earliest match."""
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """None: no logprobs; k: the chosen token's and the k likeliest ones', from raw logits."""
    thinking: ThinkingBudget | None = None
    """None: reasoning is not cut off."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; `OutputKind.PROMPT_LOGPROBS` is what computes them."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def reads_output(self) -> bool:
        """Whether a draw depends on the tokens before it by more than the model."""
        return self.has_penalties or bool(self.bad_words) or self.thinking is not None

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise InvalidRequest naming the first field that cannot be used."""
        for name, low, high in _FLOAT_RANGES:
            _check_range(name, getattr(self, name), low, high)
        if self.repetition_penalty <= 0.0:
            raise InvalidRequest("repetition_penalty must be above 0", "repetition_penalty")
        if self.top_p <= 0.0:
            raise InvalidRequest("top_p must be above 0 and at most 1", "top_p")
        for name, lowest in _INT_MINIMA:
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InvalidRequest(f"{name} must be at least {lowest}, got {value}", name)
        if self.seed > MAX_SEED:
            raise InvalidRequest(f"seed must be at most {MAX_SEED}", "seed")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > MAX_LOGPROBS:
                raise InvalidRequest(f"{name} must be at most {MAX_LOGPROBS}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens must not exceed max_tokens", "min_tokens")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings", "stop")
        if any(not s for s in self.stop):
            raise InvalidRequest("a stop string must not be empty", "stop")
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0, "logit_bias")
        _check_ids("logit_bias", self.logit_bias, vocab_size)
        _check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        self._validate_bans(vocab_size)
        self._validate_thinking(vocab_size)

    def _validate_thinking(self, vocab_size: int | None) -> None:
        if (thinking := self.thinking) is None:
            return
        if thinking.max_tokens < 0:
            raise InvalidRequest("thinking_token_budget must be at least 0", "thinking")
        if not thinking.openers or not thinking.closers or not all(thinking.closers):
            raise InvalidRequest("thinking needs openers, and closers that have tokens", "thinking")
        for ids in (*thinking.openers, *thinking.closers):
            _check_ids("thinking", ids, vocab_size)

    def _validate_bans(self, vocab_size: int | None) -> None:
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequest("allowed_token_ids must not be empty", "allowed_token_ids")
            _check_ids("allowed_token_ids", self.allowed_token_ids, vocab_size)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequest(f"at most {MAX_BAD_WORDS} bad words", "bad_words")
        for word in self.bad_words:
            if not word:
                raise InvalidRequest("a bad word must not be empty", "bad_words")
            _check_ids("bad_words", word, vocab_size)


_FLOAT_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_INT_MINIMA = (
    ("max_tokens", 1),
    ("top_k", 0),
    ("min_tokens", 0),
    ("seed", 0),
    ("logprobs", 0),
    ("prompt_logprobs", 0),
)


def _holds(output: Sequence[int], part: tuple[int, ...], start: int) -> bool:
    with contextlib.suppress(ValueError):
        while True:  # `index` is many times faster than a loop
            start = output.index(part[0], start)
            if tuple(output[start : start + len(part)]) == part:
                return True
            start += 1
    return False


def _check_range(
    name: str, value: float, low: float, high: float, param: str | None = None
) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be between {low:g} and {high:g}, got {value}", param or name
        )


def _check_ids(
    name: str, ids: Mapping[int, float] | tuple[int, ...], vocab_size: int | None
) -> None:
    for token_id in ids:
        if token_id < 0 or (vocab_size is not None and token_id >= vocab_size):
            raise InvalidRequest(
                f"{name}: token id {token_id} is outside the vocabulary of {vocab_size}", name
            )
