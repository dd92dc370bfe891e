"""`torchweave generate`: an answer or a chat on the terminal, streamed. No server, no Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchweave_ray.cli.artifact import EngineFile, Model, artifact_of, read_engine_config

if TYPE_CHECKING:
    from torchweave_ray.config import EngineConfig
    from torchweave_ray.outputs import Timings, Usage
    from torchweave_ray.sampling_params import SamplingParams

Message = dict[str, str]


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' reads stdin. Without one: a chat, line by line."),
    ] = None,
    model: Model = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, no chat.")] = False,
    system: Annotated[str | None, typer.Option(help="The system message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    engine: EngineFile = None,
) -> None:
    """Generate text here, on stdout as it comes; counts and speed go to stderr."""
    from torchweave_ray.sampling_params import SamplingParams

    if raw and prompt is None:
        raise typer.BadParameter("needs a prompt", param_hint="--raw")
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    params.validate()
    config = read_engine_config(engine)
    text = sys.stdin.read() if prompt == "-" else prompt
    writer = _Writer(artifact_of(model), config, params)
    opening = [{"role": "system", "content": system}] if system else []
    if text is None:
        _chat(writer, opening)
    elif raw or not writer.has_chat_template:
        writer.write(text)
    else:
        writer.write([*opening, {"role": "user", "content": text}])


def _chat(writer: _Writer, messages: list[Message]) -> None:
    """Lines from stdin until it ends; each answer joins the conversation."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": writer.write(messages)})


class _Writer:
    """One engine that answers one request after the other on stdout."""

    def __init__(self, folder: Path, config: EngineConfig, params: SamplingParams) -> None:
        from torchweave_ray.build import build_engine, load_model
        from torchweave_ray.tokenizer import load_tokenizer

        self._tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, config)
        self._engine = build_engine(loaded, config, self._tokenizer)
        self._model = loaded.info.id
        self._params = params
        self._num_requests = 0
        self._summary = ""

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.has_chat_template

    def write(self, prompt: str | list[Message]) -> str:
        """Stream the answer to a text or a conversation, and return it."""
        pieces = []
        for piece in self._answer(prompt):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        print(self._summary, file=sys.stderr)
        return "".join(pieces)

    def _answer(self, prompt: str | list[Message]) -> Iterator[str]:
        from torchweave_ray.errors import SequenceFailed
        from torchweave_ray.outputs import GenerateRequest

        if isinstance(prompt, str):
            token_ids = self._tokenizer.encode(prompt)
        else:
            rendered = self._tokenizer.render_chat(prompt)
            token_ids = self._tokenizer.encode(rendered, add_special_tokens=False)
        self._num_requests += 1
        request_id = f"generate-{self._num_requests}"
        self._engine.add(GenerateRequest(request_id, self._model, tuple(token_ids), self._params))
        try:
            while self._engine.has_work:
                for output in self._engine.step():
                    for delta in output.deltas:
                        yield delta.text
                        if delta.error is not None:
                            raise SequenceFailed(delta.error)
                    if output.usage is not None and output.timings is not None:
                        self._summary = _summary(output.usage, output.timings)
        finally:
            self._engine.abort(request_id)


def _summary(usage: Usage, timings: Timings) -> str:
    rest = timings.total_s - timings.ttft_s
    speed = f", {(usage.completion_tokens - 1) / rest:.1f} tok/s" if rest > 0 else ""
    return (
        f"[{usage.prompt_tokens} prompt tokens, first token after {timings.ttft_s:.2f} s, "
        f"{usage.completion_tokens} tokens{speed}]"
    )
