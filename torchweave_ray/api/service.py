"""From a validated body to requests in token ids: models, tokenizers, limits of the context.

One `Service` stands behind every endpoint. Knows nothing of HTTP answers.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchweave_ray.api.access.access import Access
from torchweave_ray.api.access.caller import CALLER
from torchweave_ray.api.access.limits import check_call, check_grammar
from torchweave_ray.api.access.usage import Usage
from torchweave_ray.api.grammar import Wanted
from torchweave_ray.api.grammar_checks import GrammarChecks
from torchweave_ray.api.observe.metrics import HttpMetrics
from torchweave_ray.api.running import RunningRequests
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.api.streams.records import StreamRecords
from torchweave_ray.errors import InvalidRequest, Unavailable
from torchweave_ray.outputs import Backend, GenerateRequest, ModelInfo, OutputKind
from torchweave_ray.sampling_params import MAX_SEED, SamplingParams
from torchweave_ray.tokenizer import Tokenizer
from torchweave_ray.tracing import TRACEPARENT

LoadTokenizer = Callable[[str], Awaitable[Tokenizer]]
"""By model id."""
Recall = Callable[[str], Awaitable[list[GenerateRequest]]]
"""By call id: see `StreamRecords`."""

_LONG_TEXT = 8_192
"""Characters from which on a text is encoded in a thread: some 4 ms of one core."""


@dataclass(frozen=True, slots=True)
class Model:
    info: ModelInfo
    tokenizer: Tokenizer


class Service:
    def __init__(
        self,
        backend: Backend,
        load_tokenizer: LoadTokenizer,
        settings: ApiSettings,
        recall: Recall | None = None,
        access: Access | None = None,
    ) -> None:
        """`recall`: None where no other process has streams."""
        self.backend = backend
        self.settings = settings
        self.metrics = HttpMetrics()
        access = access or Access()
        self.usage = Usage(access.accounts, self.metrics, access.usage_log)
        self.running = RunningRequests()
        self.grammars = GrammarChecks()
        self.streams = StreamRecords()
        self._recall = recall
        self._load_tokenizer = load_tokenizer
        self._tokenizers: dict[str, tuple[str, asyncio.Task[Tokenizer]]] = {}

    async def recall(self, call_id: str) -> list[GenerateRequest]:
        """Requests of a stream that another process had, as far as they are known."""
        return [] if self._recall is None else await self._recall(call_id)

    async def infos(self) -> list[ModelInfo]:
        """Those that the caller may use; raises Unavailable when nothing is served."""
        infos = await self.backend.models()
        if not infos:
            raise Unavailable("no model is served yet")
        caller = CALLER.get()
        return [caller.seen(info) for info in infos if caller.may_use(info.id)]

    async def info(self, name: str | None) -> ModelInfo:
        """The model that a request names, or the default; raises ModelNotFound or Forbidden."""
        caller = CALLER.get()
        if name is None:
            name = self.settings.default_model or next((i.id for i in await self.infos()), "")
            name = name if caller.may_use(name) else next((i.id for i in await self.infos()), name)
        caller.check_model(name)
        return caller.seen(await self.backend.info(name))

    async def model(self, name: str | None) -> Model:
        info = await self.info(name)
        return Model(info, await self._tokenizer(info))

    async def encode(
        self, model: Model, text: str, param: str, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """`param` names the field in the error for text that cannot be encoded."""
        try:
            if len(text) < _LONG_TEXT:
                return tuple(model.tokenizer.encode(text, add_special_tokens))
            return tuple(await asyncio.to_thread(model.tokenizer.encode, text, add_special_tokens))
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param) from None

    async def constrain(
        self, model: Model, wanted: Wanted | None, requests: Sequence[GenerateRequest]
    ) -> list[GenerateRequest]:
        """The requests with the grammar that is wanted, if any; InvalidRequest names its field."""
        if wanted is not None:
            check_grammar(self.settings, wanted.spec.text, wanted.param)
        return await self.grammars.constrain(model.info, model.tokenizer, wanted, requests)

    def sampling(
        self,
        call_id: str,
        fields: dict[str, Any],
        max_tokens: int | None,
        logprobs: int | None = None,
    ) -> SamplingParams:
        """What the client set over the operator's defaults. The seed is always set: one that
        nobody chose comes from the call's id, so that the call can be made again."""
        settings = self.settings
        defaults: dict[str, Any] = {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "seed": settings.seed if settings.seed is not None else _seed_of(call_id),
        }
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **(defaults | fields))

    def requests(
        self,
        model: Model,
        call_id: str,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams,
        *,
        n: int = 1,
        cache_salt: str = "",
        priority: int = 0,
        exclusive: bool = False,
        seeded: bool = True,
        prompt_param: str = "prompt",
        max_choices: int | None = None,
    ) -> list[GenerateRequest]:
        """One for each prompt; raises InvalidRequest naming what does not fit the model.

        Not `seeded`: each prompt after the first draws its own seed, so that equal prompts of
        one call give different texts.
        """
        info = model.info
        sampling.validate(info.vocab_size)
        check_call(self.settings, prompts, n, sampling, prompt_param, max_choices)
        if sampling.seed + n - 1 > MAX_SEED:
            raise InvalidRequest(f"seed + n must be at most {MAX_SEED}", "seed")
        is_scored = sampling.prompt_logprobs is not None
        requests = []
        for index, prompt in enumerate(prompts):
            own = sampling
            if index and not seeded:
                own = replace(sampling, seed=_seed_of(f"{call_id}-{index}"))
            requests.append(
                GenerateRequest(
                    request_id=call_id if len(prompts) == 1 else f"{call_id}-{index}",
                    model=info.id,
                    artifact_id=info.artifact_id,
                    adapter=info.adapter,
                    adapter_id=info.adapter_id,
                    prompt_token_ids=prompt,
                    sampling=self._within_context(info, prompt, own, prompt_param),
                    n=n,
                    cache_salt=cache_salt,
                    priority=priority,
                    output_kind=OutputKind.PROMPT_LOGPROBS if is_scored else OutputKind.TOKENS,
                    exclusive=exclusive,
                    traceparent=TRACEPARENT.get(),
                )
            )
        return requests

    def _within_context(
        self, info: ModelInfo, prompt: tuple[int, ...], sampling: SamplingParams, param: str
    ) -> SamplingParams:
        if not prompt:
            raise InvalidRequest(f"{param} must not be empty", param)
        if min(prompt) < 0 or max(prompt) >= info.vocab_size:
            raise InvalidRequest(
                f"{param}: token ids must be at least 0 and below {info.vocab_size}", param
            )
        room = info.max_model_len - len(prompt)
        least = sampling.max_tokens or max(sampling.min_tokens, 1)
        if least > room:
            asked = "max_tokens" if sampling.max_tokens else "min_tokens"
            raise InvalidRequest(
                f"the context holds {info.max_model_len} tokens; the prompt has {len(prompt)}, "
                f"and at least {least} more are asked for",
                param if room < 1 else asked,
                "context_length_exceeded",
            )
        default = self.settings.max_new_tokens
        if sampling.max_tokens is None and default is not None:
            return replace(sampling, max_tokens=max(min(default, room), least))
        return sampling

    async def _tokenizer(self, info: ModelInfo) -> Tokenizer:
        """Loaded once for each artifact, however many ask at once; a failure is not kept."""
        artifact_id, task = self._tokenizers.get(info.base, ("", None))
        failed = task is not None and task.done() and (task.cancelled() or task.exception())
        if task is None or failed or artifact_id != info.artifact_id:
            task = asyncio.create_task(self._load(info.base))
            self._tokenizers[info.base] = (info.artifact_id, task)
        return await asyncio.shield(task)

    async def _load(self, model_id: str) -> Tokenizer:
        tokenizer = await self._load_tokenizer(model_id)
        await asyncio.to_thread(tokenizer.warm)
        return tokenizer


def _seed_of(name: str) -> int:
    """63 bits, and room for the choices of any n above it."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (MAX_SEED - (1 << 32))
