"""A message as Anthropic streams it: its blocks one after the other, each opened and closed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torchweave_ray.api.anthropic.shapes import block_json, stop_reason_of, usage_json
from torchweave_ray.api.chat.blocks import (
    Block,
    BlockEvent,
    BlockKind,
    Blocks,
    Closed,
    Grew,
    Opened,
)
from torchweave_ray.api.chat.turn import Turn
from torchweave_ray.api.errors import anthropic_error
from torchweave_ray.api.generation import Progress
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import FinishReason, RequestOutput, Usage


class MessageWriter:
    """A `Writer`."""

    def __init__(self, turn: Turn, model: str, progress: Progress) -> None:
        self._request = turn.request
        self._model = model
        self._progress = progress
        self._parser = turn.new_parser()
        self._blocks = Blocks()
        self._has_begun = False
        self._finish: tuple[FinishReason | None, str | int | None] = (None, None)

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._progress.note(output)
        text = "" if self._has_begun else self._start()
        for delta in output.deltas:
            text += self._shown(self._blocks.feed(self._parser.feed(delta.text)))
            if delta.finish_reason is not None:
                self._finish = (delta.finish_reason, delta.stop_reason)
        return text.encode()

    def end(self) -> bytes:
        text = self._shown(self._blocks.feed(self._parser.finish()))
        text += self._shown(self._blocks.close())
        if self._progress.failure is not None:
            return text.encode() + self.error(self._progress.failure)
        reason, sequence = stop_reason_of(*self._finish, self._parser)
        text += _event(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": sequence},
            usage=usage_json(self._progress.usage),
            timings=self._progress.timings_json(),
        )
        return (text + _event("message_stop")).encode()

    def error(self, error: RequestError) -> bytes:
        body = anthropic_error(error.status, error.message)
        return _event("error", error=body["error"]).encode()

    def _start(self) -> str:
        self._has_begun = True
        message: dict[str, Any] = {
            "id": self._request.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_json(Usage(len(self._request.prompt_token_ids), 0, 0)),
        }
        return _event("message_start", message=message)

    def _shown(self, events: Iterable[BlockEvent]) -> str:
        return "".join(map(_shown, events))


def _shown(event: BlockEvent) -> str:
    index = event.block.index
    match event:
        case Opened(block):
            return _event("content_block_start", index=index, content_block=_empty(block))
        case Grew(block, piece):
            return _event("content_block_delta", index=index, delta=_delta(block, piece))
        case Closed():
            return _event("content_block_stop", index=index)


def _empty(block: Block) -> dict[str, Any]:
    return block_json(Block(block.index, block.kind, block.call_id, block.name))


def _delta(block: Block, piece: str) -> dict[str, Any]:
    match block.kind:
        case BlockKind.TEXT:
            return {"type": "text_delta", "text": piece}
        case BlockKind.REASONING:
            return {"type": "thinking_delta", "thinking": piece}
        case BlockKind.CALL:
            return {"type": "input_json_delta", "partial_json": piece}


def _event(kind: str, **content: Any) -> str:
    body = json.dumps({"type": kind, **content}, separators=(",", ":"))
    return f"event: {kind}\ndata: {body}\n\n"
