"""What /v1/completions shows of a choice: in a chunk, in a detailed chunk, and whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchweave_ray.api.generation import Choice
from torchweave_ray.api.openai.detailed_chunks import Fragment, PromptLogprobs
from torchweave_ray.api.openai.logprobs import (
    completion_logprobs,
    echoed_logprobs,
    joined_logprobs,
    prompt_logprobs_json,
)
from torchweave_ray.outputs import ChoiceDelta
from torchweave_ray.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """What the client wants to see beside the text."""

    echo: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False


class TextShape:
    """For `ChunkWriter`: text and its log-probabilities, no more."""

    kind = "text_completion"
    opening: str | None = None
    text_before = '"text":'
    text_after = ""
    empty = '"text":""'

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}

    def start_at(self, index: int, offset: int) -> None:
        """Where the choice's own text begins."""
        self._offsets[index] = offset

    def logprobs(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None:
        offset = self._offsets.get(index, 0)
        shown = completion_logprobs(self._tokenizer, delta.logprobs or (), offset)
        self._offsets[index] = offset + sum(map(len, shown["tokens"]))
        return shown


class DetailedTextShape:
    """For `DetailedWriter`."""

    kind = "text_completion"

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], n: int, shown: Shown
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._n = n
        self._shown = shown
        self._text = TextShape(tokenizer)

    @property
    def nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def opening(self, index: int, prompt_logprobs: PromptLogprobs) -> Iterator[Fragment]:
        prompt, shown = self._prompts[index // self._n], self._shown
        content: dict[str, Any] = {"text": prompt.text if shown.echo else ""}
        logprobs = None
        if shown.echo and shown.logprobs:
            logprobs = echoed_logprobs(self._tokenizer, prompt.token_ids, prompt_logprobs)
            self._text.start_at(index, sum(map(len, logprobs["tokens"])))
        if shown.token_ids:
            content["prompt_token_ids"] = list(prompt.token_ids)
        if shown.echo or shown.token_ids:
            yield Fragment(content, logprobs)

    def news(self, index: int, delta: ChoiceDelta) -> Iterator[Fragment]:
        if delta.logprobs:
            yield Fragment({"text": delta.text}, self._text.logprobs(index, delta))
        elif delta.text:
            yield Fragment({"text": delta.text})

    def ending(self, index: int, delta: ChoiceDelta) -> tuple[Fragment, str]:
        return Fragment(self.nothing), str(delta.finish_reason)


def choice_json(
    tokenizer: Tokenizer, index: int, choice: Choice, prompt: Prompt, shown: Shown
) -> dict[str, Any]:
    echoed = own = None
    if shown.logprobs:
        if shown.echo:
            echoed = echoed_logprobs(tokenizer, prompt.token_ids, choice.prompt_logprobs)
        if choice.logprobs:
            offset = sum(map(len, echoed["tokens"])) if echoed is not None else 0
            own = completion_logprobs(tokenizer, choice.logprobs, offset)
    answer: dict[str, Any] = {
        "index": index,
        "text": prompt.text + choice.text if shown.echo else choice.text,
        "logprobs": joined_logprobs(echoed, own),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if shown.prompt_logprobs:
        answer["prompt_logprobs"] = prompt_logprobs_json(tokenizer, choice.prompt_logprobs)
    if shown.token_ids:
        answer["prompt_token_ids"] = list(prompt.token_ids)
        answer["token_ids"] = choice.token_ids
    return answer


def likeliest(choices: Sequence[Choice], n: int) -> list[Choice]:
    """The n of highest log-probability per token, best first; of equals the first drawn."""

    def score(choice: Choice) -> float:
        num = len(choice.logprobs)
        return sum(entry.logprob for entry in choice.logprobs) / num if num else 0.0

    return sorted(choices, key=score, reverse=True)[:n]
