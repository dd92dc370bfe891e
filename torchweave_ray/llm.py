"""`LLM`: an artifact answering prompts in this process. Offline: no server, no Ray, no threads.

llm = LLM("artifacts/smollm2")
for completion in llm.generate(["What is gravity?"], SamplingParams(max_tokens=32)):
    print(completion.text)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from torchweave_ray.build import build_engine, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ArtifactError, InvalidRequest
from torchweave_ray.outputs import (
    FinishReason,
    GenerateRequest,
    ModelInfo,
    OutputKind,
    RequestOutput,
    Stats,
    TokenLogprobs,
    merge_outputs,
)
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import load_tokenizer
from torchweave_ray.tokenizer.grammar import GrammarSpec

if TYPE_CHECKING:
    from torchweave_ray.engine.meter import Meter

Prompts = str | Sequence[str] | Sequence[Sequence[int]]
Message = Mapping[str, Any]
Adapters = str | Sequence[str | None] | None
Grammars = GrammarSpec | Sequence[GrammarSpec | None] | None
T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (finished, total) whenever a prompt is finished."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string or token id that ended it; None for end-of-sequence or length."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry a token, where SamplingParams.logprobs asks."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One entry a prompt token, None for the first, where SamplingParams.prompt_logprobs asks."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV the prefix cache had."""
    error: str | None = None
    """Why, when finish_reason is "error"."""


class LLM:
    def __init__(self, model: str | Path, **options: Any) -> None:
        """Load an artifact folder. `options` are EngineConfig's keys, nested as in YAML:
        `LLM(path, max_model_len=1024, scheduler={"max_num_seqs": 16}, runner={"threads": 2})`.

        Raises ArtifactError naming the file at fault and ConfigError naming the key.
        """
        directory = Path(model)
        if not directory.is_dir():
            raise ArtifactError(
                f"{model} is not a folder. LLM takes an artifact and fetches nothing by name: "
                "stage the model first with `torchweave optimize`, then pass the folder it made"
            )
        self._config = EngineConfig.from_dict(options)
        self._loaded = load_model(directory, self._config)
        self.tokenizer = load_tokenizer(directory)
        self._engine = build_engine(self._loaded, self._config, self.tokenizer)
        self._meter = self._open_meter()
        self._request_ids = itertools.count()

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Progress | None = None,
        grammar: Grammars = None,
        adapter: Adapters = None,
    ) -> list[Completion]:
        """One Completion a prompt (a text, texts, or lists of token ids), in their order.

        All prompts run together, as many at once as the engine's limits allow. `params` holds for
        all or is one for each, and so does `grammar` (`tokenizer.grammar`'s `json_spec(schema)`,
        `choice_spec(texts)`, `GrammarSpec("regex", ...)`), which the texts then follow, and
        `adapter`, a name in the folder that `lora={"source": ...}` gives. Raises InvalidRequest,
        naming the field, or ModelNotFound before anything runs.
        """
        token_ids = self._encode(prompts)
        requests = self._requests(
            token_ids,
            [each or SamplingParams() for each in _one_each(params, len(token_ids), "params")],
            _one_each(grammar, len(token_ids), "grammar"),
            _one_each(adapter, len(token_ids), "adapter"),
        )
        outputs = self._run(requests, progress)
        return [_completion(r, outputs[r.request_id]) for r in requests]

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Progress | None = None,
        grammar: Grammars = None,
        adapter: Adapters = None,
    ) -> list[Completion]:
        """Answers to one conversation ([{"role": ..., "content": ...}, ...]) or to several.

        The model's chat template needs transformers' renderer. Errors as `generate`.
        """
        several: Any = [conversations] if _is_conversation(conversations) else conversations
        texts = [self.tokenizer.render_chat(messages) for messages in several]
        encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(encoded, params, progress, grammar, adapter)

    @property
    def info(self) -> ModelInfo:
        return self._loaded.info

    @property
    def startup_s(self) -> Mapping[str, float]:
        """Seconds by stage of loading."""
        return self._loaded.startup_s

    def sleep(self) -> None:
        """Unmap the weights and free the KV cache until the next prompt, or `wake`. The prefix
        cache is empty then; texts are what they would have been."""
        self._engine.rest.sleep()

    def wake(self) -> None:
        """Be ready at once for the next prompt. Raises ArtifactError if the artifact was altered
        while this slept."""
        self._engine.rest.wake()

    @property
    def is_sleeping(self) -> bool:
        return self._engine.rest.is_sleeping

    def stats(self) -> Stats:
        return self._engine.stats()

    def metrics(self) -> str:
        """Prometheus text of what this object has run; docs/metrics.md says what each is. Raises
        ImportError where prometheus-client is not installed."""
        if self._meter is None:
            raise ImportError("metrics need the package prometheus-client")
        from torchweave_ray.metrics import exposition

        return exposition([self._meter.metrics.report()]).decode()

    def close(self) -> None:
        """Free the KV cache and let go of the artifact. The object is of no use afterwards."""
        self._engine.close()
        self._loaded.lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_meter(self) -> Meter | None:
        """None on a machine that has torch, but no prometheus-client: a bare GPU box."""
        if find_spec("prometheus_client") is None:
            return None
        from torchweave_ray.engine.meter import Meter

        return Meter(math.inf, self.info.id, self._engine)

    def _encode(self, prompts: Prompts) -> list[tuple[int, ...]]:
        several: Any = [prompts] if isinstance(prompts, str) else prompts
        encoded: list[tuple[int, ...]] = []
        for prompt in several:
            if isinstance(prompt, str):
                encoded.append(tuple(self.tokenizer.encode(prompt)))
            elif isinstance(prompt, list | tuple) and all(type(i) is int for i in prompt):
                encoded.append(tuple(prompt))
            else:
                raise InvalidRequest(
                    "prompts must be a text, a list of texts or a list of token id lists, got "
                    f"an entry of type {type(prompt).__name__}",
                    "prompts",
                )
        return encoded

    def _requests(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: Sequence[SamplingParams],
        grammars: Sequence[GrammarSpec | None],
        adapters: Sequence[str | None],
    ) -> list[GenerateRequest]:
        requests = [
            GenerateRequest(
                f"llm-{next(self._request_ids)}",
                self.info.with_adapter(adapter).id if adapter else self.info.id,
                prompt,
                sampling,
                adapter=adapter or "",
                grammar=None if grammar is None else grammar.llguidance(),
                output_kind=OutputKind.TOKENS
                if sampling.prompt_logprobs is None
                else OutputKind.PROMPT_LOGPROBS,
            )
            for prompt, sampling, grammar, adapter in zip(
                prompts, params, grammars, adapters, strict=True
            )
        ]
        for request in requests:
            self._engine.check(request)
        return requests

    def _run(
        self, requests: Sequence[GenerateRequest], progress: Progress | None
    ) -> dict[str, RequestOutput]:
        outputs: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
        num_finished = 0
        try:
            for request in requests:
                self._engine.add(request)
            while self._engine.has_work:
                started_at = time.monotonic()
                news = self._engine.step()
                if self._meter is not None:
                    self._meter.measure(news, time.monotonic() - started_at)
                for output in news:
                    outputs[output.request_id].append(output)
                    num_finished += output.is_last
                    if output.is_last and progress is not None:
                        progress(num_finished, len(requests))
        except BaseException:  # Ctrl-C in the middle of a step, too: begin anew, empty
            self._loaded.runner.reset()
            self._engine = build_engine(self._loaded, self._config, self.tokenizer)
            self._meter = self._open_meter()
            raise
        return {request_id: merge_outputs(parts) for request_id, parts in outputs.items()}


def _one_each(value: T | Sequence[T] | None, num: int, name: str) -> list[T | None]:
    if isinstance(value, list | tuple):
        if len(value) != num:
            raise InvalidRequest(f"{len(value)} {name} for {num} prompts", name)
        return list(value)
    return [cast("T | None", value)] * num


def _is_conversation(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], Mapping)


def _completion(request: GenerateRequest, output: RequestOutput) -> Completion:
    (delta,) = output.deltas
    assert delta.finish_reason is not None
    assert output.usage is not None
    return Completion(
        prompt_token_ids=request.prompt_token_ids,
        token_ids=delta.token_ids,
        text=delta.text,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        logprobs=delta.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        num_cached_tokens=output.usage.cached_tokens,
        error=delta.error,
    )
