"""A response and its output items as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchweave_ray.api.chat.blocks import Block, BlockKind
from torchweave_ray.api.generation import Progress
from torchweave_ray.api.responses.schema import ResponsesBody
from torchweave_ray.outputs import FinishReason

_PREFIXES = {BlockKind.TEXT: "msg", BlockKind.REASONING: "rs", BlockKind.CALL: "fc"}


def item_id(response_id: str, block: Block) -> str:
    return f"{_PREFIXES[block.kind]}_{response_id.removeprefix('resp_')}_{block.index}"


def item_json(response_id: str, block: Block, status: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": item_id(response_id, block), "status": status}
    match block.kind:
        case BlockKind.TEXT:
            content = [part_json(block)] if status != "in_progress" else []
            return {**item, "type": "message", "role": "assistant", "content": content}
        case BlockKind.REASONING:
            content = [part_json(block)] if status != "in_progress" else []
            return {**item, "type": "reasoning", "summary": [], "content": content}
        case BlockKind.CALL:
            return {
                **item,
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": block.text,
            }


def part_json(block: Block) -> dict[str, Any]:
    if block.kind is BlockKind.REASONING:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


class ResponseShape:
    """What all forms of one response say alike."""

    def __init__(self, body: ResponsesBody, response_id: str, created: int, model: str) -> None:
        self.id = response_id
        self._body = body
        self._created = created
        self._model = model

    def open(self) -> dict[str, Any]:
        return self._response("in_progress", [], None)

    def closed(
        self, blocks: Sequence[Block], reason: FinishReason | None, progress: Progress
    ) -> dict[str, Any]:
        is_whole = reason is FinishReason.STOP
        status = "completed" if is_whole else "incomplete"
        items = [item_json(self.id, block, "completed") for block in blocks]
        if items and not is_whole:
            items[-1]["status"] = "incomplete"
        response = self._response(status, items, progress)
        if not is_whole:
            why = "max_output_tokens" if reason is FinishReason.LENGTH else "stopped"
            response["incomplete_details"] = {"reason": why}
        return response

    def failed(self, message: str, code: str | None) -> dict[str, Any]:
        response = self._response("failed", [], None)
        response["error"] = {"code": code or "server_error", "message": message}
        return response

    def _response(
        self, status: str, output: list[dict[str, Any]], progress: Progress | None
    ) -> dict[str, Any]:
        body = self._body
        choice = body.tool_choice or "auto"
        response: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "metadata": {},
            "usage": None,
        }
        if progress is not None:
            response["usage"] = _usage(progress)
            response["timings"] = progress.timings_json()
        return response


def _format(body: ResponsesBody) -> dict[str, Any]:
    chosen = body.text.format if body.text is not None else None
    if chosen is None:
        return {"type": "text"}
    return chosen.model_dump(by_alias=True, exclude_none=True)


def _usage(progress: Progress) -> dict[str, Any]:
    usage = progress.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
