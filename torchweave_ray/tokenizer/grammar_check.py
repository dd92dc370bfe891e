"""Whether a stranger's grammar may be used: compiled in a process of its own that can be killed.

llguidance bounds most grammars, but some of a few dozen bytes still take it minutes or gigabytes.
The worker (`python -m` this module) forks for each grammar, within CPU time and memory; what has
passed may be compiled anywhere. Knows no requests and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections import OrderedDict
from typing import IO, Any

from llguidance import LLTokenizer

from torchweave_ray.errors import InvalidRequest, Unavailable
from torchweave_ray.tokenizer.grammar import (
    GrammarCompiler,
    GrammarSpec,
    invalid_grammar,
    make_vocabulary,
)

CPU_LIMIT_S = 1.0
"""Of one grammar: compiled, and the first mask computed."""
_MEMORY_LIMIT = 4 << 30
_ANSWER_WITHIN_S = 30.0
"""By the clock, however busy the machine is: the worker is polite and gives way to the engine."""
_NICE = 10
_MAX_CACHED = 256
_TOO_SLOW = f"it takes more than {CPU_LIMIT_S:g} s or {_MEMORY_LIMIT >> 30} GiB to compile"


class GrammarChecker:
    """Checks grammars over one tokenizer, each once. The worker starts at the first of them."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._vocabulary = {
            "tokenizer_json": tokenizer_json,
            "vocab_size": vocab_size,
            "eos_token_ids": eos_token_ids,
        }
        self._checks: OrderedDict[bytes, asyncio.Task[str | InvalidRequest]] = OrderedDict()
        self._turn = asyncio.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    async def check(self, spec: GrammarSpec) -> str:
        """`GenerateRequest.grammar` of this spec; raises InvalidRequest for param "grammar"."""
        key = hashlib.sha256(f"{spec.kind}\n{spec.text}".encode()).digest()
        task = self._checks.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._checks[key] = asyncio.create_task(self._ask_in_turn(spec))
            if len(self._checks) > _MAX_CACHED:
                self._checks.popitem(last=False)
        self._checks.move_to_end(key)
        # Shielded: whoever leaves first must not leave the worker's answer unread.
        verdict = await asyncio.shield(task)
        if isinstance(verdict, InvalidRequest):
            raise verdict
        return verdict

    def close(self) -> None:
        """Stop the worker; it also ends by itself with this process."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    async def _ask_in_turn(self, spec: GrammarSpec) -> str | InvalidRequest:
        async with self._turn:
            return await asyncio.to_thread(self._ask, spec)

    def _ask(self, spec: GrammarSpec) -> str | InvalidRequest:
        """In a thread, one at a time. Raises Unavailable when the worker says nothing."""
        message = {"kind": spec.kind, "text": spec.text}
        if self._worker is not None and self._worker.poll() is not None:
            self.close()  # killed since the last grammar
        try:
            if self._worker is None:
                self._worker = _start_worker(self._vocabulary)
            verdict = _exchange(self._worker, message)
        except OSError as error:
            self.close()
            raise Unavailable(f"grammars cannot be checked now: {error}") from error
        if "refusal" in verdict:
            return InvalidRequest(verdict["refusal"], "grammar")
        grammar: str = verdict["grammar"]
        return grammar


def _start_worker(vocabulary: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", __name__]
    # Not every path of this process is in its environment: Ray sets some by itself.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    _exchange(worker, vocabulary)
    return worker


def _exchange(worker: subprocess.Popen[bytes], message: dict[str, Any]) -> dict[str, Any]:
    """One line there, one line back; raises OSError when none comes."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    _send(worker.stdin, message)
    readable, _, _ = select.select([worker.stdout], [], [], _ANSWER_WITHIN_S)
    line = worker.stdout.readline() if readable else b""
    if not line:
        raise OSError("the process that checks them gave no answer")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _send(stream: IO[bytes], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


# In the worker.


def main() -> None:
    """First line: the vocabulary; then a grammar a line. Ends with its standard input."""
    os.nice(_NICE)
    compiler = _compiler(json.loads(sys.stdin.buffer.readline()))
    _send(sys.stdout.buffer, {})
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            _send(sys.stdout.buffer, _verdict(compiler, json.loads(line)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:  # it has said nothing
            _send(sys.stdout.buffer, {"refusal": str(invalid_grammar(_TOO_SLOW))})


def _compiler(vocabulary: dict[str, Any]) -> GrammarCompiler:
    """Has its vocabulary already: all children share it."""
    try:
        made = make_vocabulary(**vocabulary)
    except InvalidRequest as error:
        refusal = error  # told to whoever asks

        def refuse() -> LLTokenizer:
            raise refusal

        return GrammarCompiler(refuse)
    return GrammarCompiler(lambda: made)


def _verdict(compiler: GrammarCompiler, spec: dict[str, str]) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)  # its signal kills, whatever is running
    try:
        grammar = GrammarSpec(spec["kind"], spec["text"]).llguidance()  # type: ignore[arg-type]
        matcher = compiler.compile(grammar).deep_copy()
        matcher.compute_bitmask()
        if matcher.is_error():
            raise invalid_grammar(matcher.get_error())
    except InvalidRequest as error:
        return {"refusal": error.message}
    return {"grammar": grammar}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
