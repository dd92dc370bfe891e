"""One turn of a conversation: the engine's request for it, and how to read what comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchweave_ray.api.chat.answer import AnswerParser
from torchweave_ray.api.chat.prompt import ChatPrompt, Conversation, render
from torchweave_ray.api.grammar import Wanted
from torchweave_ray.api.service import Model, Service
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import GenerateRequest


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """How the answer is drawn and shown, in the engine's terms."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    """SamplingParams' fields that the client set."""
    max_tokens: int | None = None
    logprobs: int | None = None
    n: int = 1
    cache_salt: str = ""
    priority: int = 0
    wanted: Wanted | None = None
    """What the answer has to be; calls that are enforced come before it."""
    prompt_param: str = "messages"
    """The protocol's name of what the prompt is made of."""


@dataclass(frozen=True, slots=True)
class Turn:
    request: GenerateRequest
    prompt: ChatPrompt

    @property
    def is_plain(self) -> bool:
        """The answer is nothing but text."""
        return self.prompt.new_parser is None

    def new_parser(self, index: int = 0) -> AnswerParser:
        if self.prompt.new_parser is None:
            return AnswerParser(None, None)
        return self.prompt.new_parser(f"{self.request.request_id}:{index}")


async def take_turn(
    service: Service, model: Model, call_id: str, conversation: Conversation, options: TurnOptions
) -> Turn:
    """Raises InvalidRequest in the engine's names: max_tokens, logprobs, ..."""
    param = options.prompt_param
    try:
        prompt = render(model.tokenizer, conversation)
    except InvalidRequest as error:
        if error.param != "messages":
            raise
        raise InvalidRequest(error.message, param, error.code) from None
    # The template wrote the special tokens itself: none are added again.
    ids = await service.encode(model, prompt.text, param, add_special_tokens=False)
    fields = dict(options.sampling)
    if prompt.keeps_special_tokens:
        fields["skip_special_tokens"] = False
    if prompt.thinking is not None:
        fields["thinking"] = prompt.thinking
    sampling = service.sampling(call_id, fields, options.max_tokens, options.logprobs)
    (request,) = service.requests(
        model,
        call_id,
        [ids],
        sampling,
        n=options.n,
        cache_salt=options.cache_salt,
        priority=options.priority,
        prompt_param=param,
    )
    wanted = options.wanted if prompt.grammar is None else Wanted(prompt.grammar, "tools")
    (request,) = await service.constrain(model, wanted, [request])
    return Turn(request, prompt)
