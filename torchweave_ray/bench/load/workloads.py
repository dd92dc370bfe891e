"""What is asked: random prompts, prompts that share prefixes, conversations. All from one seed.

A script is what one client says: a turn, or several, each after all that was said before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, get_args

from torchweave_ray.bench.load.dialects import Prompt
from torchweave_ray.bench.load.prompts import PromptSource, joined
from torchweave_ray.errors import ConfigError

Kind = Literal["random", "shared-prefix", "multi-turn"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Turn:
    words: Prompt
    pause_s: float = 0.0
    """Of a reader, between the answer before it and this turn."""


Script = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Work W1 of docs/performance.md unless said otherwise. Lengths are words, or tokens where
    `tokenizer` is a tokenizer.json. Raises ConfigError for what does not go together."""

    kind: Kind = "random"
    input_len: int = 100
    """Of a prompt; beside its prefix; of a conversation's first turn."""
    output_len: int = 128
    prefix_len: int = 1000
    prefixes: int = 1
    """So many different ones take turns."""
    turns: int = 4
    turn_len: int = 40
    """What a later turn adds."""
    pause_s: float = 0.0
    """Mean of the pauses, which are exponential."""
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"workload {self.kind!r}: one of {', '.join(KINDS)}")
        if self.kind == "multi-turn" and self.tokenizer is not None:
            raise ConfigError(
                "multi-turn goes with text, for answers join the prompt: no tokenizer"
            )

    def scripts(self, seed: int) -> Iterator[Script]:
        """Without end. Equal seeds give equal scripts."""
        fresh = PromptSource(self.input_len, seed, self.tokenizer)
        if self.kind == "shared-prefix":
            source = PromptSource(self.prefix_len, seed + 1, self.tokenizer)
            prefixes = [source.next_prompt() for _ in range(self.prefixes)]
            for i in count():
                yield (Turn(joined(prefixes[i % self.prefixes], fresh.next_prompt())),)
        elif self.kind == "multi-turn":
            more = PromptSource(self.turn_len, seed + 1)
            pauses = random.Random(seed + 2)
            while True:
                yield (
                    Turn(fresh.next_prompt()),
                    *(Turn(more.next_prompt(), self._pause(pauses)) for _ in range(self.turns - 1)),
                )
        else:
            while True:
                yield (Turn(fresh.next_prompt()),)

    def _pause(self, source: random.Random) -> float:
        return source.expovariate(1 / self.pause_s) if self.pause_s else 0.0
