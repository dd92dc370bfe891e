"""/v1/generate streams text as server-sent events; /v1/generate_nobatch answers in one piece."""

from __future__ import annotations

import json

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import error_json, renamed
from torchweave_ray.api.generation import Progress, collect, generate
from torchweave_ray.api.native.schema import GenerateBody
from torchweave_ray.api.schema import parse
from torchweave_ray.api.service import Service
from torchweave_ray.api.sse import EventStream, data_event
from torchweave_ray.errors import InvalidRequest, RequestError
from torchweave_ray.outputs import GenerateRequest, RequestOutput

_OUR_NAMES = {"max_tokens": "max_new_tokens"}


class NativeApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def stream(self, call: Call) -> ASGIApp:
        request = await self._request(call, exclusive=False)
        progress = Progress(call, request.model)
        outputs = generate(call, self._service, [request], is_stream=True)
        interval = self._service.settings.ping_interval_s
        return EventStream(call, outputs, _TextWriter(progress), interval)

    async def unbatched(self, call: Call) -> ASGIApp:
        """The baseline: this request is alone in its steps."""
        request = await self._request(call, exclusive=True)
        progress = Progress(call, request.model)
        outputs = generate(call, self._service, [request])
        (choice,) = await collect(outputs, progress, num_prompts=1, n=1)
        answer = {
            "text": choice.text,
            "finish_reason": choice.finish_reason,
            "usage": progress.usage_json(),
            "timings": progress.timings_json(),
        }
        return JSONResponse(answer, headers=call.headers)

    async def _request(self, call: Call, exclusive: bool) -> GenerateRequest:
        body = parse(GenerateBody, call)
        model = await self._service.model(body.model)
        prompt = (
            await self._service.encode(model, body.prompt, "prompt")
            if isinstance(body.prompt, str)
            else tuple(body.prompt)
        )
        if not body.prompt:
            raise InvalidRequest("prompt must not be empty", "prompt")
        sampling = self._service.sampling(
            call.id, body.sampling_fields(model.tokenizer), body.max_new_tokens
        )
        try:
            (request,) = self._service.requests(
                model, f"gen-{call.id}", [prompt], sampling, exclusive=exclusive
            )
        except InvalidRequest as error:
            raise renamed(error, _OUR_NAMES) from None
        (request,) = await self._service.constrain(model, body.wanted(), [request])
        return request


class _TextWriter:
    """`event: ttft` with the seconds, text as data, `event: done` with the counts."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._finish_reason: str | None = None
        self._stop_reason: str | int | None = None

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        is_first = self._progress.ttft_s is None
        self._progress.note(output)
        events = ""
        if is_first and self._progress.ttft_s is not None:
            events = f"event: ttft\ndata: {self._progress.ttft_s:.6f}\n\n"
        for delta in output.deltas:
            if delta.text:
                events += data_event(delta.text)
            if delta.finish_reason is not None:
                self._finish_reason = delta.finish_reason
                self._stop_reason = delta.stop_reason
        return events.encode()

    def end(self) -> bytes:
        if self._progress.failure is not None:
            return self.error(self._progress.failure)
        done = {
            "finish_reason": self._finish_reason,
            "stop_reason": self._stop_reason,
            "usage": self._progress.usage_json(),
            "timings": self._progress.timings_json(),
        }
        return f"event: done\ndata: {json.dumps(done)}\n\n".encode()

    def error(self, error: RequestError) -> bytes:
        return f"event: error\ndata: {error_json(error)}\n\n".encode()
