"""Tokens a second of `LLM.generate` beside transformers' continuous batching, in one run; what
graphs and steps ahead bring; and where a step's time goes."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchweave_ray.bench.gpu.device import Ceilings, synchronize
from torchweave_ray.bench.gpu.random_model import state_dict
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import CONFIG, WEIGHTS
from torchweave_ray.sampling_params import SamplingParams

_PROFILED = 16
"""Output tokens."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {"decode_graphs": True, "step_depth": 1},
    {"decode_graphs": True, "step_depth": 0},
    {"decode_graphs": False, "step_depth": 1},
    {"decode_graphs": False, "step_depth": 0},
)


@dataclass(frozen=True, slots=True)
class Load:
    num_seqs: int
    input_len: int
    output_len: int

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_seqs, self.input_len)
        ids: list[list[int]] = torch.randint(3, vocab_size, shape, generator=generator).tolist()
        return ids


def measure_llm(
    artifact: Path, loads: Sequence[Load], settings: dict[str, Any], ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """One line a load, then one of its profile."""
    vocab = json.loads((artifact / CONFIG).read_text())["vocab_size"]
    most = max(load.num_seqs for load in loads)
    options = {"max_num_seqs": most, "max_num_batched_tokens": max(2048, most)}
    with LLM(artifact, scheduler=options, runner=settings) as llm:
        weight_bytes = (artifact / WEIGHTS).stat().st_size
        about = {"executor": llm.info.executor, **settings}
        yield {"startup_s": {k: round(v, 3) for k, v in llm.startup_s.items()}, **about}
        for load in loads:
            params = SamplingParams(temperature=0.0, max_tokens=load.output_len, ignore_eos=True)
            llm.generate(load.prompts(vocab, seed=1), params)
            steps = llm.stats().num_steps
            start = time.perf_counter()
            found = llm.generate(load.prompts(vocab, seed=2), params)
            seconds = time.perf_counter() - start
            steps = llm.stats().num_steps - steps
            line = _line("ours", load, sum(len(c.token_ids) for c in found), seconds) | about
            line["ms_a_step"] = round(1e3 * seconds / steps, 3)
            if load.num_seqs == 1:
                read = weight_bytes * load.output_len / seconds / 1e9
                line["share_of_bandwidth"] = round(read / ceilings.gbyte_s, 3)
            yield line
            few = replace(params, max_tokens=min(_PROFILED, load.output_len))
            yield {"profile": _profile(llm, load.prompts(vocab, seed=3), few), **about}


def measure_transformers(
    artifact: Path, loads: Sequence[Load], device: torch.device
) -> Iterator[dict[str, Any]]:
    """The same weights and work. A line with `error` where it cannot run."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        yield {"target": "transformers", "error": str(error)}
        return
    hf_config = AutoConfig.from_pretrained(artifact)
    model: Any = AutoModelForCausalLM.from_config(
        hf_config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.load_state_dict(state_dict(artifact))
    model = model.to(device).eval()
    options: dict[str, Any] = {}
    if device.type == "cpu":  # or it takes most of the machine's memory for its cache
        from transformers import ContinuousBatchingConfig

        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=8)
    for load in loads:
        asked = GenerationConfig(
            max_new_tokens=load.output_len, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        try:
            for seed in (1, 2):  # the first one warms up
                prompts = load.prompts(hf_config.vocab_size, seed)
                synchronize(device)
                start = time.perf_counter()
                found = model.generate_batch(prompts, generation_config=asked, **options)
                seconds = time.perf_counter() - start
            num_tokens = sum(len(each.generated_tokens) for each in found.values())
            yield _line("transformers", load, num_tokens, seconds)
        except Exception as error:  # whatever it is, our own lines stand
            yield {"target": "transformers", "num_seqs": load.num_seqs, "error": repr(error)}
    del model
    gc.collect()
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def _line(target: str, load: Load, num_tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "target": target,
        "num_seqs": load.num_seqs,
        "input_len": load.input_len,
        "output_len": load.output_len,
        "num_tokens": num_tokens,
        "seconds": round(seconds, 4),
        "tok_s": round(num_tokens / seconds, 1),
    }


def _profile(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> dict[str, Any]:
    """Milliseconds of the whole run by kernel, the largest first, and how much of it the device was
    busy."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    is_gpu = llm.info.device != "cpu"
    if is_gpu:
        activities.append(ProfilerActivity.CUDA)
    start = time.perf_counter()
    with profile(activities=activities) as profiler:
        llm.generate(prompts, params)
    wall_ms = 1e3 * (time.perf_counter() - start)
    rows = []
    for event in profiler.key_averages():
        us = getattr(event, "self_device_time_total", 0.0) if is_gpu else event.self_cpu_time_total
        rows.append((us / 1e3, event.key[:80], event.count))
    rows.sort(reverse=True)
    largest = {name: {"ms": round(ms, 3), "calls": calls} for ms, name, calls in rows[:14]}
    busy = round(sum(ms for ms, _, _ in rows) / wall_ms, 3)
    return {"wall_ms": round(wall_ms, 2), "busy_share": busy, "largest": largest}
