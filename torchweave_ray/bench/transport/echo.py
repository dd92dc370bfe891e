"""A model that is not there: a runner that answers a prompt with itself, in steps of a fixed time.

With it a benchmark measures the way of a token and nothing else: engine, API and transport are the
real ones. For benchmarks only; no recipe or argument of a server leads here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from torchweave_ray.build import LoadedModel
from torchweave_ray.config import EngineConfig, SchedulerConfig
from torchweave_ray.engine.plan import (
    PendingStep,
    RuntimeLimits,
    ScheduledSequence,
    StepOutput,
    StepPlan,
    StepResult,
)
from torchweave_ray.loading.tuning import TunedSettings
from torchweave_ray.models.artifact import Manifest
from torchweave_ray.outputs import ModelInfo
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.tokenizer import TOKENIZER_FILE

END = "<|end|>"
MODEL = "echo"
NUM_BLOCKS = 8192
MAX_MODEL_LEN = 4096
ECHO_ENGINE = EngineConfig(
    scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=16_384)
)
"""Wide enough for every prompt to be done in its first step."""


@dataclass(frozen=True, slots=True)
class EchoStep:
    step_result: StepResult
    due_at: float

    def result(self) -> StepResult:
        time.sleep(max(0.0, self.due_at - time.monotonic()))
        return self.step_result


class EchoRunner:
    """Token i of an answer is token i of its prompt, again from the first behind the last."""

    def __init__(self, limits: RuntimeLimits, step_s: float) -> None:
        self.limits = limits
        self._step_s = step_s

    def submit(self, plan: StepPlan) -> PendingStep:
        token_ids = [
            [_next_token(entry)] if entry.output is StepOutput.SAMPLE else []
            for entry in plan.sequences
        ]
        return EchoStep(StepResult(token_ids), time.monotonic() + self._step_s)

    def release(self, seq_id: int) -> None:
        """Nothing is kept."""

    def check_health(self) -> None:
        """Nothing can be wrong."""

    def close(self) -> None:
        """Nothing is held."""


def _next_token(entry: ScheduledSequence) -> int:
    return entry.token_ids[entry.output_index % entry.num_prompt_tokens]


def load_echo(step_s: float, folder: Path) -> LoadedModel:
    """As `load_model`, with a tokenizer of single bytes that is written to `folder`."""
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / TOKENIZER_FILE))
    end = tokenizer.token_to_id(END)
    assert end is not None
    limits = RuntimeLimits(
        NUM_BLOCKS,
        ECHO_ENGINE.cache.block_size,
        MAX_MODEL_LEN,
        tokenizer.get_vocab_size(),
        (end,),
    )
    info = ModelInfo(
        id=MODEL,
        artifact_id=MODEL,
        numerics_id=MODEL,
        architecture="Echo",
        vocab_size=limits.vocab_size,
        eos_token_ids=limits.eos_token_ids,
        device="cpu",
        dtype="none",
        executor=MODEL,
        max_model_len=limits.max_model_len,
        max_num_seqs=ECHO_ENGINE.scheduler.max_num_seqs,
        block_size=limits.block_size,
        kv_dtype="none",
    )
    manifest = Manifest(MODEL, MODEL, "", "Echo", "none", "none", {})
    # Of a loaded model's runner the engine only needs what every Runner has.
    runner = cast(ModelRunner, EchoRunner(limits, step_s))
    return LoadedModel(runner, info, manifest, folder, TunedSettings(), {})


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte of UTF-8, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer
