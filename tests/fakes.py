"""A `Backend` that says what a test tells it to, and remembers what it was asked: no test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tests.tiny import EOS_TOKEN_ID, make_tokenizer
from torchweave_ray.errors import Unavailable, model_not_found
from torchweave_ray.outputs import (
    ChoiceDelta,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    OutputKind,
    RequestOutput,
    Stats,
    Timings,
    TokenLogprobs,
    Usage,
)
from torchweave_ray.reported import Reported
from torchweave_ray.tokenizer import Tokenizer

MODEL = ModelInfo(
    id="tiny",
    artifact_id="artifact-1",
    numerics_id="numerics-1",
    architecture="LlamaForCausalLM",
    vocab_size=300,
    eos_token_ids=(EOS_TOKEN_ID,),
    device="cpu",
    dtype="float32",
    executor="torch",
    max_model_len=512,
    max_num_seqs=8,
    block_size=16,
    kv_dtype="float32",
)


@dataclass
class Script:
    """What a request is answered with."""

    pieces: Sequence[str] = ("Gravity", " pulls", ".")
    """One output each, the same for every choice; its tokens are those of the text."""
    finish_reason: FinishReason = FinishReason.STOP
    stop_reason: str | int | None = None
    refusal: Exception | None = None
    """Raised before the first output."""
    failure: Exception | None = None
    """Raised after the pieces, in place of the end."""
    error: str | None = None
    """Ends choice 0 with finish_reason "error"."""
    gates: Mapping[int, asyncio.Event] = field(default_factory=dict)
    """Piece i waits for its event; the end is piece len(pieces)."""


class FakeBackend:
    def __init__(
        self, script: Script | None = None, models: Sequence[ModelInfo] = (MODEL,)
    ) -> None:
        self.script = script or Script()
        self.infos = list(models)
        self.tokenizer = Tokenizer(make_tokenizer(), {})
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.elsewhere: set[str] = set()
        """Call ids of requests that another ingress has running."""
        self.asleep = False
        self.on_abort = asyncio.Event()
        self.on_request = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        self.requests.append(request)
        self.on_request.set()
        is_done = False
        script = self.script
        try:
            if script.refusal is not None:
                raise script.refusal
            if request.output_kind is OutputKind.POOLED:
                is_done = True
                yield self._pooled(request)
                return
            for index, piece in enumerate(script.pieces):
                await self._gate(index)
                yield self._piece(request, index, piece)
            await self._gate(len(script.pieces))
            if script.failure is not None:
                raise script.failure
            is_done = True
            yield self._end(request)
        finally:
            if not is_done:
                self.aborted.append(request.request_id)
                self.on_abort.set()

    async def stop(self, call_id: str) -> bool:
        return call_id in self.elsewhere

    async def models(self) -> list[ModelInfo]:
        return self.infos

    async def info(self, model: str) -> ModelInfo:
        by_id = {info.id: info for info in self.infos}
        if not by_id:
            raise Unavailable("no model is served yet")
        if model not in by_id:
            raise model_not_found(model, by_id)
        return by_id[model]

    async def sleeping(self, model: str | None, want: bool | None) -> dict[str, list[bool]]:
        self.asleep = self.asleep if want is None else want
        return {info.id: [self.asleep] for info in self.infos if model in (None, info.id)}

    async def stats(self) -> dict[str, Stats]:
        return {info.id: Stats() for info in self.infos}

    async def metrics(self) -> list[Reported]:
        return []

    async def _gate(self, index: int) -> None:
        await asyncio.sleep(0)  # a real backend always lets others run
        if index in self.script.gates:
            await self.script.gates[index].wait()

    def _piece(self, request: GenerateRequest, index: int, piece: str) -> RequestOutput:
        ids = tuple(self.tokenizer.encode(piece))
        logprobs = None
        if request.sampling.logprobs is not None:
            top = tuple((3 + k, -0.5 - k) for k in range(request.sampling.logprobs))
            logprobs = tuple(TokenLogprobs(i, -0.25, 1, top) for i in ids)
        delta = ChoiceDelta(0, index, ids, piece, logprobs)
        scores = None
        if index == 0 and request.output_kind is OutputKind.PROMPT_LOGPROBS:
            top = tuple((3 + k, -1.5 - k) for k in range(request.sampling.prompt_logprobs or 0))
            scores = (None, *(TokenLogprobs(i, -2.0, 9, top) for i in request.prompt_token_ids[1:]))
        return RequestOutput(
            request.request_id,
            tuple(replace(delta, index=i) for i in range(request.n)),
            prompt_logprobs=scores,
        )

    def _pooled(self, request: GenerateRequest) -> RequestOutput:
        delta = ChoiceDelta(0, 0, (), "", None, FinishReason.STOP)
        num = len(request.prompt_token_ids)
        values = (3.0, 4.0, float(request.pooling == "mean"))
        timings = Timings(0.001, 0.002, 0.003)
        return RequestOutput(request.request_id, (delta,), Usage(num, 0, 0), timings, pooled=values)

    def _end(self, request: GenerateRequest) -> RequestOutput:
        script = self.script
        deltas = [
            ChoiceDelta(i, 99, (), "", None, script.finish_reason, script.stop_reason)
            for i in range(request.n)
        ]
        if script.error is not None:
            deltas[0] = replace(deltas[0], finish_reason=FinishReason.ERROR, error=script.error)
        num_tokens = sum(len(self.tokenizer.encode(piece)) for piece in script.pieces)
        usage = Usage(len(request.prompt_token_ids), num_tokens * request.n, cached_tokens=1)
        return RequestOutput(request.request_id, tuple(deltas), usage, Timings(0.001, 0.002, 0.003))
