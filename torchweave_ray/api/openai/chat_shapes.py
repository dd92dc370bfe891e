"""What /v1/chat/completions shows of a choice: in a chunk, in a detailed chunk, and whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torchweave_ray.api.chat.answer import AnswerParser, NewParser
from torchweave_ray.api.chat.parts import CallArguments, CallStart, Part, Reasoning, Text, join
from torchweave_ray.api.generation import Choice
from torchweave_ray.api.openai.detailed_chunks import Fragment, PromptLogprobs
from torchweave_ray.api.openai.logprobs import chat_logprobs
from torchweave_ray.outputs import ChoiceDelta, FinishReason
from torchweave_ray.tokenizer import Tokenizer


class ChatShape:
    """For `ChunkWriter`: content and its log-probabilities, no more."""

    kind = "chat.completion.chunk"
    opening: str | None = '"delta":{"role":"assistant","content":""}'
    text_before = '"delta":{"content":'
    text_after = "}"
    empty = '"delta":{}'

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def logprobs(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, delta.logprobs or ())


class DetailedChatShape:
    """For `DetailedWriter`."""

    kind = "chat.completion.chunk"

    def __init__(
        self,
        tokenizer: Tokenizer,
        new_parser: NewParser,
        prompt_token_ids: tuple[int, ...] | None,
    ) -> None:
        """`prompt_token_ids`: when they are to be shown."""
        self._tokenizer = tokenizer
        self._new_parser = new_parser
        self._parsers: dict[int, AnswerParser] = {}
        self._prompt_token_ids = prompt_token_ids

    @property
    def nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def opening(self, index: int, prompt_logprobs: PromptLogprobs) -> Iterator[Fragment]:
        self._parsers[index] = self._new_parser(index)
        beside = None
        if self._prompt_token_ids is not None:
            beside = {"prompt_token_ids": list(self._prompt_token_ids)}
        yield Fragment({"delta": {"role": "assistant", "content": ""}}, None, beside)

    def news(self, index: int, delta: ChoiceDelta) -> Iterator[Fragment]:
        logprobs = chat_logprobs(self._tokenizer, delta.logprobs) if delta.logprobs else None
        parser = self._parsers[index]
        parts = parser.feed(delta.text)
        if delta.finish_reason is not None:
            parts += parser.finish()
        for part in parts:
            yield Fragment({"delta": _delta(part)}, logprobs)
            logprobs = None
        if logprobs is not None:
            yield Fragment(self.nothing, logprobs)

    def ending(self, index: int, delta: ChoiceDelta) -> tuple[Fragment, str]:
        return Fragment(self.nothing), finish_reason(delta.finish_reason, self._parsers[index])


def choice_json(
    tokenizer: Tokenizer,
    index: int,
    choice: Choice,
    new_parser: NewParser,
    shows_token_ids: bool,
) -> dict[str, Any]:
    parser = new_parser(index)
    parts = join([*parser.feed(choice.text), *parser.finish()])
    answer: dict[str, Any] = {
        "index": index,
        "message": _message(parts),
        "logprobs": chat_logprobs(tokenizer, choice.logprobs) if choice.logprobs else None,
        "finish_reason": finish_reason(choice.finish_reason, parser),
        "stop_reason": choice.stop_reason,
    }
    if shows_token_ids:
        answer["token_ids"] = choice.token_ids
    return answer


def finish_reason(reason: FinishReason | None, parser: AnswerParser) -> str:
    return "tool_calls" if parser.has_calls and reason is FinishReason.STOP else str(reason)


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(parts: Sequence[Part]) -> dict[str, Any]:
    content = "".join(part.text for part in parts if isinstance(part, Text))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    arguments = {part.index: part.text for part in parts if isinstance(part, CallArguments)}
    calls = [
        {
            "id": part.id,
            "type": "function",
            "function": {"name": part.name, "arguments": arguments.get(part.index, "")},
        }
        for part in parts
        if isinstance(part, CallStart)
    ]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content or (None if calls else ""),
        "refusal": None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message
