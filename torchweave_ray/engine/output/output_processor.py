"""Tokens of a step to `RequestOutput`s: text, stop strings, usage, timings.

Asks the scheduler to finish a sequence whose stop string matched; decides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torchweave_ray.engine.output.detokenizer import TextStream
from torchweave_ray.engine.scheduler import Scheduler
from torchweave_ray.engine.sequence import RequestState, Sequence, SequenceUpdate
from torchweave_ray.outputs import (
    ChoiceDelta,
    FinishReason,
    OutputKind,
    RequestOutput,
    Timings,
    Usage,
)
from torchweave_ray.tokenizer import Detokenizer


@dataclass(slots=True)
class _ChoiceStream:
    text: TextStream
    num_emitted_tokens: int
    num_chars_to_skip: int
    """Of a resumed request: text that the client has already."""
    replayed: str = ""
    """Text of resumed tokens, until it goes out with the first delta."""


class OutputProcessor:
    def __init__(
        self, detokenizer: Detokenizer, scheduler: Scheduler, clock: Callable[[], float]
    ) -> None:
        self._detokenizer = detokenizer
        self._scheduler = scheduler
        self._clock = clock
        self._streams: dict[int, _ChoiceStream] = {}

    def resume(self, seq: Sequence, is_ended: bool) -> bool:
        """Replay a resumed sequence's tokens; True if a stop string ends it.

        `is_ended`: its last token was a stop token, whose text can match nothing.
        """
        stream = self._open(seq)
        tokens = seq.state.request.output_token_ids
        for token_id in tokens[:-1] if is_ended else tokens:
            stream.replayed += stream.text.push(token_id)
            if stream.text.matched is not None:
                return True
        if is_ended and seq.state.request.sampling.include_stop_str_in_output:
            stream.replayed += stream.text.flush(tokens[-1])
        return False

    def process(self, updates: Iterable[SequenceUpdate]) -> list[RequestOutput]:
        """One output for each request with news, in the order of the updates."""
        deltas: dict[RequestState, list[ChoiceDelta]] = {}
        for update in updates:
            deltas.setdefault(update.seq.state, []).append(self._delta(update))
        return [self._output(state, news) for state, news in deltas.items()]

    def _delta(self, update: SequenceUpdate) -> ChoiceDelta:
        seq = update.seq
        stream = self._streams.get(seq.seq_id) or self._open(seq)
        text, stream.replayed = stream.replayed, ""
        token_ids = update.token_ids
        num_text = len(token_ids) - (seq.finish_reason is FinishReason.STOP)  # else an end token
        num = 0
        while num < num_text and stream.text.matched is None:
            text += stream.text.push(token_ids[num])
            num += 1
        matched, end_token_id = stream.text.matched, None
        if matched is None and num < len(token_ids):
            if seq.state.request.sampling.include_stop_str_in_output:
                end_token_id = token_ids[-1]
        elif num < len(token_ids):  # drafts that were right, but the text ended before them
            del seq.token_ids[num - len(token_ids) :]
            token_ids = token_ids[:num]
        if matched is not None:
            self._scheduler.finish(seq, FinishReason.STOP, matched)
        if seq.is_finished:
            text += stream.text.flush(end_token_id)
            del self._streams[seq.seq_id]
        skipped = min(stream.num_chars_to_skip, len(text))
        stream.num_chars_to_skip -= skipped
        first_index = stream.num_emitted_tokens
        stream.num_emitted_tokens += len(token_ids)
        return ChoiceDelta(
            index=seq.index,
            first_index=first_index,
            token_ids=token_ids,
            text=text[skipped:],
            logprobs=update.logprobs[: len(token_ids)] if update.logprobs else update.logprobs,
            finish_reason=FinishReason.STOP if matched is not None else seq.finish_reason,
            stop_reason=matched if matched is not None else seq.stop_reason,
            error=seq.error,
        )

    def _output(self, state: RequestState, deltas: list[ChoiceDelta]) -> RequestOutput:
        now = self._clock()
        prompt_logprobs = None
        if state.first_token_s is None and any(delta.token_ids for delta in deltas):
            state.first_token_s = now
            if state.request.output_kind is OutputKind.PROMPT_LOGPROBS:
                prompt_logprobs = tuple(state.prompt_logprobs)
        usage = timings = None
        if state.is_finished:
            deltas += self._never_begun(state)
            usage, timings = _usage(state), _timings(state, now)
        return RequestOutput(
            state.request.request_id, tuple(deltas), usage, timings, prompt_logprobs, state.pooled
        )

    def _never_begun(self, state: RequestState) -> list[ChoiceDelta]:
        """Choices that would have forked from one that ended before its first token."""
        first = state.sequences[0]
        return [
            ChoiceDelta(index, 0, (), "", None, first.finish_reason, None, first.error)
            for index in range(len(state.sequences), state.request.n)
        ]

    def _open(self, seq: Sequence) -> _ChoiceStream:
        request = seq.state.request
        decoder = self._detokenizer.decoder(request.sampling.skip_special_tokens)
        stream = _ChoiceStream(
            TextStream(decoder, request.sampling),
            num_emitted_tokens=len(request.output_token_ids),
            num_chars_to_skip=request.emitted_chars,
        )
        self._streams[seq.seq_id] = stream
        return stream


def _usage(state: RequestState) -> Usage:
    return Usage(
        prompt_tokens=len(state.request.prompt_token_ids),
        completion_tokens=sum(seq.num_output_tokens for seq in state.sequences),
        cached_tokens=state.num_cached_tokens,
    )


def _timings(state: RequestState, now: float) -> Timings:
    total = now - state.arrival_s
    return Timings(
        queue_s=(state.first_scheduled_s or now) - state.arrival_s,
        ttft_s=(state.first_token_s or now) - state.arrival_s,
        total_s=total,
    )
