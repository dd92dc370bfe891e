"""What the ingress pays for a token of a stream: CPU from the engine's news to the bytes sent.

The whole HTTP app over a backend that is always ready; no sockets, no engine. Give it an artifact's
folder, whose tokenizer it takes; `--save` writes a results file.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message

from torchweave_ray.api.app import create_app
from torchweave_ray.bench.origin import save_results
from torchweave_ray.outputs import (
    ChoiceDelta,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    RequestOutput,
    Stats,
    Timings,
    TokenLogprobs,
    Usage,
)
from torchweave_ray.tokenizer import Tokenizer, load_tokenizer

TOKENS, STREAMS, ROUNDS = 1000, 8, 5
LIMIT_US = 20.0
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "What is gravity?"}]}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "Gravity is"}),
    "chat": ("/v1/chat/completions", ASK),
    "chat, tools": ("/v1/chat/completions", ASK | {"tools": [TOOL]}),
    "chat, usage in every chunk": (
        "/v1/chat/completions",
        ASK | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat, top_logprobs 2": ("/v1/chat/completions", ASK | {"logprobs": True, "top_logprobs": 2}),
    "messages": ("/v1/messages", ASK),
    "responses": ("/v1/responses", {"input": "What is gravity?"}),
    "generate": ("/v1/generate", {"prompt": "Gravity is"}),
}


class Ready:
    """A Backend with one token after the other, none of which anybody waits for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._info = ModelInfo(
            "model", "", "", "", 49152, (2,), "cpu", "float32", "", 8192, 64, 16, "float32"
        )
        ids = tokenizer.encode(" The apple fell, 4 days later: it lay in the grass.\n", False)
        self._words = [(i, tokenizer.decode([i])) for i in ids]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestOutput]:
        name, num_top = request.request_id, request.sampling.logprobs
        for index in range(self.num_tokens):
            token_id, text = self._words[index % len(self._words)]
            logprobs = None
            if num_top is not None:
                top = tuple((token_id + k, -1.0 - k) for k in range(num_top))
                logprobs = (TokenLogprobs(token_id, -1.0, 1, top),)
            yield RequestOutput(name, (ChoiceDelta(0, index, (token_id,), text, logprobs),))
        end = ChoiceDelta(0, self.num_tokens, (), "", None, FinishReason.LENGTH)
        usage = Usage(len(request.prompt_token_ids), self.num_tokens, 0)
        yield RequestOutput(name, (end,), usage, Timings(0.0, 0.0, 0.0))

    async def stop(self, call_id: str) -> bool:
        return False

    async def models(self) -> list[ModelInfo]:
        return [self._info]

    async def info(self, model: str) -> ModelInfo:
        return self._info

    async def sleeping(self, model: str | None, want: bool | None) -> dict[str, list[bool]]:
        return {}

    async def stats(self) -> dict[str, Stats]:
        return {}

    async def metrics(self) -> list[Any]:
        return []


async def answer(app: ASGIApp, path: str, body: dict[str, Any]) -> int:
    """Chunks that were sent."""
    messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
    num_chunks = 0

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()  # the client stays

    async def send(message: Message) -> None:
        nonlocal num_chunks
        assert message.get("status", 200) == 200, (path, message)
        num_chunks += bool(message.get("body"))

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"headers": [], "query_string": b"", "root_path": "", "http_version": "1.1"}
    await app({**scope, "asgi": {"version": "3.0"}, "scheme": "http"}, receive, send)
    return num_chunks


async def cpu_s(app: ASGIApp, backend: Ready, case: str, num_tokens: int) -> float:
    path, body = CASES[case]
    limit = "max_new_tokens" if case == "generate" else "max_tokens"
    limit = "max_output_tokens" if case == "responses" else limit
    body = body | {limit: TOKENS + 1}
    body = body if case == "generate" else body | {"stream": True}
    backend.num_tokens = num_tokens
    start = time.process_time()
    sent = await asyncio.gather(*(answer(app, path, body) for _ in range(STREAMS)))
    assert min(sent) >= 0.8 * num_tokens  # white space may wait for what follows
    return time.process_time() - start


async def measure(artifact: Path) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(artifact)
    backend = Ready(tokenizer)

    async def load(model_id: str) -> Tokenizer:
        return tokenizer

    app = create_app(backend, load)
    points = []
    for case in CASES:
        await cpu_s(app, backend, case, 1)  # warm
        costs = []
        for _ in range(ROUNDS):
            whole = await cpu_s(app, backend, case, TOKENS + 1)
            once = await cpu_s(app, backend, case, 1)
            costs.append(1e6 * (whole - once) / (TOKENS * STREAMS))
        points.append({"case": case, "cpu_us_per_token": round(statistics.median(costs), 1)})
        print(points[-1])
    return points


def main() -> None:
    points = asyncio.run(measure(Path(sys.argv[1])))
    if "--save" in sys.argv:
        config = {"tokens": TOKENS, "streams": STREAMS, "rounds": ROUNDS}
        print(save_results("chunk-cost", config, points))
    if points[1]["cpu_us_per_token"] > LIMIT_US:
        sys.exit(f"a token of a plain chat costs more than {LIMIT_US:g} us")


if __name__ == "__main__":
    main()
