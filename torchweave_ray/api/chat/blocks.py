"""Parts of an answer as blocks that open, grow and close: one of reasoning, text or a call each.

For protocols that number such blocks. Knows none of them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torchweave_ray.api.chat.parts import CallStart, Part, Reasoning, Text


class BlockKind(enum.StrEnum):
    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"


@dataclass(slots=True)
class Block:
    """Grows while it is open."""

    index: int
    kind: BlockKind
    call_id: str = ""
    name: str = ""
    text: str = ""
    """Of a call: its arguments."""


@dataclass(frozen=True, slots=True)
class Opened:
    block: Block


@dataclass(frozen=True, slots=True)
class Grew:
    block: Block
    piece: str


@dataclass(frozen=True, slots=True)
class Closed:
    block: Block


BlockEvent = Opened | Grew | Closed


class Blocks:
    def __init__(self) -> None:
        self.all: list[Block] = []
        self._is_open = False

    def feed(self, parts: Iterable[Part]) -> Iterator[BlockEvent]:
        for part in parts:
            if isinstance(part, CallStart):
                yield from self.close()
                yield self._open(Block(len(self.all), BlockKind.CALL, part.id, part.name))
                continue
            kind = BlockKind.CALL
            if isinstance(part, Text | Reasoning):
                kind = BlockKind.TEXT if isinstance(part, Text) else BlockKind.REASONING
                if not self._is_open or self.all[-1].kind is not kind:
                    yield from self.close()
                    yield self._open(Block(len(self.all), kind))
            block = self.all[-1]
            block.text += part.text
            yield Grew(block, part.text)

    def close(self) -> Iterator[BlockEvent]:
        if self._is_open:
            self._is_open = False
            yield Closed(self.all[-1])

    def _open(self, block: Block) -> BlockEvent:
        self.all.append(block)
        self._is_open = True
        return Opened(block)


def blocks_of(parts: Iterable[Part]) -> list[Block]:
    blocks = Blocks()
    for _ in blocks.feed(parts):
        pass
    return blocks.all
