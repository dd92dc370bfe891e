"""Blocks, stop reasons and usage as Anthropic writes them."""

from __future__ import annotations

import json
from typing import Any

from torchweave_ray.api.chat.answer import AnswerParser
from torchweave_ray.api.chat.blocks import Block, BlockKind
from torchweave_ray.outputs import FinishReason, Usage


def block_json(block: Block) -> dict[str, Any]:
    """A finished block; a call that was cut off has the empty object for its input."""
    match block.kind:
        case BlockKind.TEXT:
            return {"type": "text", "text": block.text, "citations": None}
        case BlockKind.REASONING:
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case BlockKind.CALL:
            return {
                "type": "tool_use",
                "id": block.call_id,
                "name": block.name,
                "input": _object(block.text),
            }


def stop_reason_of(
    reason: FinishReason | None, stopped_by: str | int | None, parser: AnswerParser
) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence)"""
    if reason is FinishReason.LENGTH:
        return "max_tokens", None
    if isinstance(stopped_by, str):
        return "stop_sequence", stopped_by
    return ("tool_use" if parser.has_calls else "end_turn"), None


def usage_json(usage: Usage) -> dict[str, Any]:
    """Tokens read from the cache are counted apart from the other input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
