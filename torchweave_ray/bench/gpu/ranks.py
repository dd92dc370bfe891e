"""Two ranks, each with a GPU, beside one: logprobs of whole prompts; then a rank that is killed.
Says so where there is one GPU only; a dry run takes two processes on the CPU.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from torchweave_ray.bench.gpu.random_model import FAMILIES, make_artifact
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.errors import EngineDead
from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams

_WORST = {torch.float32: 2e-3, torch.bfloat16: 0.2}
"""Of a token's logprob: bf16 sums of two slices are rounded elsewhere than those of one."""
_KILL_AFTER_S, _SOON_S = 0.5, 30.0


def check_ranks(folder: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    is_dry = device.type == "cpu"
    if not is_dry and torch.cuda.device_count() < 2:
        yield {"check": "ranks", "skipped": "torch sees one GPU"}
        return
    for name in ("llama",) if is_dry else FAMILIES:
        for dtype in (torch.float32,) if is_dry else (torch.float32, torch.bfloat16):
            place = folder / f"ranks-{name}-{str(dtype).removeprefix('torch.')}"
            artifact = make_artifact(place, FAMILIES[name], dtype)
            error = _logprobs_error(artifact, 6 if is_dry else 60)
            yield {
                "check": "ranks",
                "model": name,
                "dtype": str(dtype),
                "error": round(error, 6),
                "allowed": _WORST[dtype],
                "is_right": error <= _WORST[dtype],
            }
    yield _killed(make_artifact(folder / "ranks-killed", FAMILIES["llama"], torch.float32))


def _open(artifact: Path, num_ranks: int) -> LLM:
    runner = {"executor": "triton", "decode_graphs": False}
    cache = {"kv_memory": 16 << 20}
    return LLM(artifact, tensor_parallel_size=num_ranks, runner=runner, cache=cache)


def _logprobs_error(artifact: Path, length: int) -> float:
    """The largest, of the tokens of three prompts."""
    prompts = [[(7 * i + n) % 300 for i in range(length + n)] for n in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    found: list[Sequence[float]] = []
    for num_ranks in (1, 2):
        with _open(artifact, num_ranks) as llm:
            answers = llm.generate(prompts, params)
        entries = [entry for each in answers for entry in each.prompt_logprobs or ()]
        found.append([entry.logprob for entry in entries if entry is not None])
    alone, sliced = found
    return max(abs(a - b) for a, b in zip(alone, sliced, strict=True))


def _killed(artifact: Path) -> dict[str, Any]:
    """In the middle of steps: nothing waits for it for long."""
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with _open(artifact, 2) as llm:
        llm.generate([[5]], SamplingParams(max_tokens=2))
        (pid,) = ProcessTree([os.getpid()]).named("torchweave_ray.parallel.rank")
        started_at = time.monotonic()
        threading.Timer(_KILL_AFTER_S, os.kill, (pid, signal.SIGKILL)).start()
        why = ""
        try:
            while time.monotonic() - started_at < _SOON_S:
                llm.generate([[5, 6, 7]], params)
        except EngineDead as error:
            why = str(error)
        seconds = time.monotonic() - started_at - _KILL_AFTER_S
    is_right = "rank 1 died" in why and seconds < _SOON_S
    return {
        "check": "killed rank",
        "says": why,
        "seconds": round(seconds, 2),
        "is_right": is_right,
    }
