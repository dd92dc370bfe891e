"""What travels between the API and whatever generates: request, outputs, `Backend`.

`AsyncEngine` is a Backend by shape, `RayBackend` another, the tests' fake a third.
Token ids only: nothing here tokenises, and nothing here knows Ray or torch.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torchweave_ray.reported import Reported
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.stream_origin import StreamOrigin


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class OutputKind(enum.StrEnum):
    """What a request wants back."""

    TOKENS = "tokens"
    PROMPT_LOGPROBS = "prompt_logprobs"
    POOLED = "pooled"


class Pooling(enum.StrEnum):
    """Which hidden states `pooled` is made of."""

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class BusAddress:
    """Where an ingress listens for token frames; see deployments/bus.py."""

    host: str
    port: int
    secret: str
    ingress_id: str


@dataclass(frozen=True, slots=True)
class RoutingHint:
    """What the choice of a replica goes by; made once, where the request arrives."""

    num_tokens: int = 0
    marks: tuple[tuple[int, bytes], ...] = ()
    """(tokens, hash) of the prompt's beginnings, shortest first; see block_hash.prefix_marks."""
    session: str = ""
    avoid: tuple[str, ...] = ()
    """Replicas that refused this request or were lost with it."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request in token ids.

    A resumed request carries what its client already has: `output_token_ids` count as output
    for penalties, min/max tokens, stop strings and usage, and `emitted_chars` of their text are
    not sent again. Resuming needs n == 1: each choice i resumes alone, with seed + i.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    artifact_id: str = ""
    """Refused when it is set and differs from what the replica serves."""
    adapter: str = ""  # a LoRA adapter's name; `model` then ends with a colon and it
    adapter_id: str = ""  # hash of its content; refused when the name stands for something else
    output_token_ids: tuple[int, ...] = ()
    emitted_chars: int = 0
    n: int = 1
    tenant: str = ""
    weight: float = 1.0  # the tenant's share of the engine, among those that compete for it
    priority: int = 0  # higher goes first, among the tenant's own
    deadline: float | None = None
    """On the engine's clock; one that travels is a `Deadline`. A request still unfinished then is
    ended, and before it begins as soon as its prompt cannot be computed in time."""
    cache_salt: str = ""
    """Requests share cached prefixes only with equal (tenant, cache_salt)."""
    cache_group: str = ""  # of tenants that share them; it takes the tenant's place there
    grammar: str | None = None
    output_kind: OutputKind = OutputKind.TOKENS
    pooling: Pooling = Pooling.LAST  # for OutputKind.POOLED
    exclusive: bool = False  # alone in its steps, no prefix cache: the unbatched baseline
    session_id: str = ""
    """Requests of one session go to one replica where there are several."""
    routing: RoutingHint | None = None
    """Set by the backend that has several replicas."""
    delivery: BusAddress | None = None
    """None: outputs travel on the handle call; else as frames to this ingress."""
    origin: StreamOrigin | None = None
    """Of a stream that its client can open again."""
    traceparent: str = ""  # W3C trace context of the span that this request is part of

    @property
    def base_model(self) -> str:
        return self.model.removesuffix(f":{self.adapter}") if self.adapter else self.model


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one position, from raw logits."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), likeliest first."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice gained since its last delta. `text` never splits a character."""

    index: int
    first_index: int
    """Index among the choice's generated tokens of token_ids[0] (a resumed one counts on)."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token id that ended it; None for end-of-sequence or length."""
    error: str | None = None
    """Why, when finish_reason is "error"."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact token counts of a request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, measured where the engine runs."""

    queue_s: float
    ttft_s: float
    """From arrival at the engine to the first token."""
    total_s: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one request, at most one a step; `usage` is set on the last one only."""

    request_id: str
    deltas: tuple[ChoiceDelta, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    pooled: tuple[float, ...] | None = None
    numerics_id: str = ""
    """Set once where a stream goes on under other numerics than it began with: from here on its
    text may differ from the undisturbed one."""

    @property
    def is_last(self) -> bool:
        return self.usage is not None


def merge_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Several outputs of one request, in order, as one: what a slow reader gets."""
    if len(outputs) == 1:
        return outputs[0]
    by_index: dict[int, list[ChoiceDelta]] = {}
    for output in outputs:
        for delta in output.deltas:
            by_index.setdefault(delta.index, []).append(delta)
    last = outputs[-1]
    return RequestOutput(
        request_id=last.request_id,
        deltas=tuple(_merge_deltas(deltas) for deltas in by_index.values()),
        usage=last.usage,
        timings=last.timings,
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs), None),
        pooled=last.pooled,
        numerics_id=next((o.numerics_id for o in outputs if o.numerics_id), ""),
    )


def _merge_deltas(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    last = deltas[-1]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return ChoiceDelta(
        index=last.index,
        first_index=deltas[0].first_index,
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(logprobs) if logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
    )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a replica serves; GET /model and /v1/models show it."""

    id: str
    artifact_id: str
    numerics_id: str  # equal ids promise identical continuation on another replica
    architecture: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    executor: str
    max_model_len: int
    max_num_seqs: int
    block_size: int
    kv_dtype: str  # what the KV cache holds: int8, or `dtype`
    quantization: Mapping[str, str] = field(default_factory=dict)  # format by tensor group
    speculation: str = "none"  # the method by which tokens are guessed
    has_adapters: bool = False  # LoRA adapters may be asked for
    adapter: str = ""  # a LoRA adapter's name; `id` is then the base model's, a colon and it
    adapter_id: str = ""  # hash of its content; "": not looked at yet

    @property
    def base(self) -> str:
        """Id of the model without its adapter."""
        return self.id.removesuffix(f":{self.adapter}") if self.adapter else self.id

    def with_adapter(self, name: str, adapter_id: str = "") -> ModelInfo:
        return replace(self, id=f"{self.id}:{name}", adapter=name, adapter_id=adapter_id)


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of one engine; counters grow from its start."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    """That prompts still have to compute, less what the prefix cache had when last looked up."""
    num_blocks: int = 0
    num_free_blocks: int = 0  # those no sequence holds; cached ones count as free
    num_cacheable_tokens: int = 0  # that all blocks hold the KV of, in every layer
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_computed_tokens: int = 0
    """Tokens that steps took on, prompts and decodes, recomputed ones included."""
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # draft tokens that their draws gave, too
    num_finished: int = 0
    num_failed: int = 0
    num_restored_tokens: int = 0  # of cached blocks that came back from the disk
    num_saved_blocks: int = 0
    num_damaged_blocks: int = 0
    num_asleep: int = 0  # 1: this engine sleeps
    num_wakes: int = 0

    @property
    def kv_usage(self) -> float:
        return 1.0 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0


class Backend(Protocol):
    """Whatever can answer requests. Leaving the iterator early aborts the request. `sleeping`: have
    replicas of a model, None: of all, sleep or wake up; by model, whether each sleeps then."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        """Yield outputs until one `is_last`; raises RequestError before the first if refused."""
        ...

    async def stop(self, call_id: str) -> bool:
        """End every request whose id has this call's own random one, 32 hex digits, in it, with
        "abort", wherever it came from. False when there is none."""
        ...

    async def models(self) -> list[ModelInfo]: ...

    async def info(self, model: str) -> ModelInfo: ...  # ModelNotFound, or Unavailable as it starts

    async def sleeping(self, model: str | None, want: bool | None) -> dict[str, list[bool]]: ...

    async def stats(self) -> dict[str, Stats]: ...  # by model id, summed over replicas

    async def metrics(self) -> list[Reported]: ...  # of every process behind it that answers
