"""A response as it is streamed: its items one after the other, each opened, grown and closed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torchweave_ray.api.chat.answer import AnswerParser
from torchweave_ray.api.chat.blocks import (
    Block,
    BlockEvent,
    BlockKind,
    Blocks,
    Closed,
    Grew,
    Opened,
)
from torchweave_ray.api.generation import Progress
from torchweave_ray.api.responses.shapes import ResponseShape, item_id, item_json, part_json
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import FinishReason, RequestOutput

_TEXTS = {BlockKind.TEXT: "output_text", BlockKind.REASONING: "reasoning_text"}


class ResponseWriter:
    """A `Writer`."""

    def __init__(self, shape: ResponseShape, parser: AnswerParser, progress: Progress) -> None:
        self._shape = shape
        self._parser = parser
        self._progress = progress
        self._blocks = Blocks()
        self.num_events = 0
        """Sent so far: the next one's sequence number."""
        self._reason: FinishReason | None = None

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._progress.note(output)
        text = self._start()
        for delta in output.deltas:
            text += self._shown(self._blocks.feed(self._parser.feed(delta.text)))
            self._reason = delta.finish_reason or self._reason
        return text.encode()

    def end(self) -> bytes:
        text = self._shown(self._blocks.feed(self._parser.finish()))
        text += self._shown(self._blocks.close())
        if self._progress.failure is not None:
            return text.encode() + self.error(self._progress.failure)
        response = self._shape.closed(self._blocks.all, self._reason, self._progress)
        kind = "completed" if response["status"] == "completed" else "incomplete"
        return (text + self._event(f"response.{kind}", response=response)).encode()

    def error(self, error: RequestError) -> bytes:
        response = self._shape.failed(error.message, error.code)
        text = self._start() + self._event("response.failed", response=response)
        return text.encode()

    def _start(self) -> str:
        if self.num_events:
            return ""
        response = self._shape.open()
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def _shown(self, events: Iterable[BlockEvent]) -> str:
        text = ""
        for event in events:
            match event:
                case Opened(block):
                    text += self._opened(block)
                case Grew(block, piece):
                    kind = f"response.{_TEXTS.get(block.kind, 'function_call_arguments')}.delta"
                    text += self._event(kind, **self._place(block), delta=piece)
                case Closed(block):
                    text += self._closed(block)
        return text

    def _opened(self, block: Block) -> str:
        item = item_json(self._shape.id, block, "in_progress")
        text = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind in _TEXTS:
            part = part_json(Block(block.index, block.kind))
            text += self._event("response.content_part.added", **self._place(block), part=part)
        return text

    def _closed(self, block: Block) -> str:
        place = self._place(block)
        if (name := _TEXTS.get(block.kind)) is not None:
            text = self._event(f"response.{name}.done", **place, text=block.text)
            text += self._event("response.content_part.done", **place, part=part_json(block))
        else:
            text = self._event(
                "response.function_call_arguments.done",
                **place,
                name=block.name,
                arguments=block.text,
            )
        item = item_json(self._shape.id, block, "completed")
        return text + self._event("response.output_item.done", output_index=block.index, item=item)

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {
            "item_id": item_id(self._shape.id, block),
            "output_index": block.index,
        }
        if block.kind in _TEXTS:
            place["content_index"] = 0
        if block.kind is BlockKind.TEXT:
            place["logprobs"] = []
        return place

    def _event(self, kind: str, **content: Any) -> str:
        body = {"type": kind, "sequence_number": self.num_events, **content}
        self.num_events += 1
        return f"event: {kind}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n"
