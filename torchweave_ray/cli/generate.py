"""`torchweave generate`: an answer on the terminal, streamed. No server, no Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchweave_ray.cli.artifact import (
    AsJson,
    EngineFile,
    Model,
    artifact_of,
    read_engine_config,
)

if TYPE_CHECKING:
    from torchweave_ray.config import EngineConfig
    from torchweave_ray.outputs import RequestOutput, Timings, Usage
    from torchweave_ray.sampling_params import SamplingParams

Message = dict[str, str]


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads stdin.")],
    model: Model = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, no chat.")] = False,
    system: Annotated[str | None, typer.Option(help="The system message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    engine: EngineFile = None,
    as_json: AsJson = False,
) -> None:
    """Generate text here, on stdout as it comes; counts and speed go to stderr."""
    from torchweave_ray.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    params.validate()
    config = read_engine_config(engine)
    text = sys.stdin.read() if prompt == "-" else prompt
    writer = _Writer(artifact_of(model), config, params)
    opening = [{"role": "system", "content": system}] if system else []
    is_raw = raw or not writer.has_chat_template
    writer.write(text if is_raw else [*opening, {"role": "user", "content": text}], as_json)


class _Writer:
    """An engine, for one answer on stdout."""

    def __init__(self, folder: Path, config: EngineConfig, params: SamplingParams) -> None:
        from torchweave_ray.build import build_engine, load_model
        from torchweave_ray.tokenizer import load_tokenizer

        self._tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, config)
        self._engine = build_engine(loaded, config, self._tokenizer)
        self._model = loaded.info.id
        self._params = params
        self._last: RequestOutput | None = None

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.has_chat_template

    def write(self, prompt: str | list[Message], as_json: bool) -> None:
        """The answer to a text or a conversation."""
        pieces = []
        for piece in self._answer(prompt):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        assert self._last is not None
        usage, timings = self._last.usage, self._last.timings
        assert usage is not None
        assert timings is not None
        if as_json:
            (reason,) = (d.finish_reason for d in self._last.deltas if d.finish_reason)
            counts = {"usage": asdict(usage), "timings": asdict(timings)}
            print(json.dumps({"text": "".join(pieces), "finish_reason": reason, **counts}))
        else:
            print(flush=True)
            print(_summary(usage, timings), file=sys.stderr)

    def _answer(self, prompt: str | list[Message]) -> Iterator[str]:
        from torchweave_ray.errors import SequenceFailed
        from torchweave_ray.outputs import GenerateRequest

        if isinstance(prompt, str):
            token_ids = self._tokenizer.encode(prompt)
        else:
            rendered = self._tokenizer.render_chat(prompt)
            token_ids = self._tokenizer.encode(rendered, add_special_tokens=False)
        self._engine.add(GenerateRequest("generate", self._model, tuple(token_ids), self._params))
        while self._engine.has_work:
            for output in self._engine.step():
                self._last = output
                for delta in output.deltas:
                    yield delta.text
                    if delta.error is not None:
                        raise SequenceFailed(delta.error)


def _summary(usage: Usage, timings: Timings) -> str:
    rest = timings.total_s - timings.ttft_s
    speed = f", {(usage.completion_tokens - 1) / rest:.1f} tok/s" if rest > 0 else ""
    return (
        f"[{usage.prompt_tokens} prompt tokens, first token after {timings.ttft_s:.2f} s, "
        f"{usage.completion_tokens} tokens{speed}]"
    )
