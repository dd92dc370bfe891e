"""/tokenize, /detokenize and /render: what a prompt becomes, without generating anything."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.chat.prompt import render
from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.openai.chat import conversation_of
from torchweave_ray.api.openai.schema import ChatBody, ConversationBody
from torchweave_ray.api.schema import Body, parse
from torchweave_ray.api.service import Model, Service
from torchweave_ray.errors import InvalidRequest


class TokenizeBody(Body):
    model: str | None = Field(None, description="the default model when it is left out")
    prompt: str
    add_special_tokens: bool | None = Field(None, description="as a prompt gets them; true")
    return_token_strs: bool | None = Field(None, description="the tokens' texts as well")


class TokenizeChatBody(ConversationBody):
    model: str | None = Field(None, description="the default model when it is left out")
    return_token_strs: bool | None = Field(None, description="the tokens' texts as well")


class DetokenizeBody(Body):
    model: str | None = Field(None, description="the default model when it is left out")
    tokens: list[int]
    skip_special_tokens: bool | None = Field(None, description="false")


class TokensApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, call: Call) -> ASGIApp:
        if "messages" in call.body:
            chat = parse(TokenizeChatBody, call)
            model = await self._service.model(chat.model)
            ids = (await self._render(call, chat, model))[1]
            return _answer(call, _described(model, ids, bool(chat.return_token_strs)))
        body = parse(TokenizeBody, call)
        model = await self._service.model(body.model)
        adds = body.add_special_tokens is not False
        ids = await self._service.encode(model, body.prompt, "prompt", adds)
        return _answer(call, _described(model, ids, bool(body.return_token_strs)))

    async def detokenize(self, call: Call) -> ASGIApp:
        body = parse(DetokenizeBody, call)
        model = await self._service.model(body.model)
        if any(not 0 <= token_id < model.info.vocab_size for token_id in body.tokens):
            raise InvalidRequest(
                f"tokens: ids must be at least 0 and below {model.info.vocab_size}", "tokens"
            )
        skips = bool(body.skip_special_tokens)
        return _answer(call, {"prompt": model.tokenizer.decode(body.tokens, skips)})

    async def render(self, call: Call) -> ASGIApp:
        """Takes what /v1/chat/completions takes."""
        body = parse(ChatBody, call)
        model = await self._service.model(body.model)
        text, ids = await self._render(call, body, model)
        return _answer(call, {"prompt": text, **_described(model, ids, False)})

    async def _render(
        self, call: Call, body: ConversationBody, model: Model
    ) -> tuple[str, tuple[int, ...]]:
        text = render(model.tokenizer, conversation_of(body, model.tokenizer, call)).text
        return text, await self._service.encode(model, text, "messages", False)


def _described(model: Model, ids: tuple[int, ...], with_texts: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "tokens": list(ids),
        "count": len(ids),
        "max_model_len": model.info.max_model_len,
    }
    if with_texts:
        texts = (model.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids)
        described["token_strs"] = list(texts)
    return described


def _answer(call: Call, content: dict[str, Any]) -> JSONResponse:
    return JSONResponse(content, headers=call.headers)
