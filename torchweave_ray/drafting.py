"""The second model of `speculation.method: draft`: its artifact opened, compared, ready to run.

Its tokens must mean what the served model's mean; weights, layers and dtype are its own. It shares
the served model's threads and KV memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import tokenizers
import torch

from torchweave_ray.attention.base import block_bytes
from torchweave_ray.config import EngineConfig
from torchweave_ray.engine.kv_groups import KVGroups
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.engine.speculation.draft_model import DraftModel
from torchweave_ray.engine.speculation.drafter import Proposer
from torchweave_ray.engine.speculation.ngram import NgramProposer
from torchweave_ray.errors import ConfigError
from torchweave_ray.hf.opening import open_executor
from torchweave_ray.models.artifact import (
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Lease,
    Manifest,
    hold_artifact,
    verify_artifact,
)
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement
from torchweave_ray.models.native_executor import NativeExecutor
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import DecoderSpec, Executor
from torchweave_ray.runner.backends import choose_kernels, sampler_of
from torchweave_ray.runner.device import resolve_dtype, resolve_kv_dtype
from torchweave_ray.runner.kv_cache import KVCache, KVShape
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.runner.opening import grouping_of, run_first_step


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft model that is ready to run steps."""

    runner: ModelRunner
    share: float
    """Of the bytes that a step of the served model reads, those that one of its steps does."""
    directory: Path
    reopen: Callable[[Executor], Executor]
    """Its weights again, beside a new executor of the served model."""
    lease: Lease = field(default_factory=Lease)


class OpenDraft:
    """Its weights are there; it has no KV cache yet."""

    def __init__(
        self,
        directory: Path,
        served: Path,
        config: EngineConfig,
        placement: Placement,
        executor: Executor,
    ) -> None:
        """`executor`, `placement`: of the model in `served`. Raises ArtifactError for what is no
        whole artifact, ConfigError where its tokens are others."""
        if not (directory / MANIFEST).is_file():
            raise ConfigError(
                f"speculation.model: {directory} is not an artifact's folder; stage the draft "
                "model with `torchweave optimize` and give the folder that it made"
            )
        self._lease = hold_artifact(directory)
        manifest, large = verify_artifact(directory), verify_artifact(served, elsewhere=(WEIGHTS,))
        check_same_tokens(directory, manifest, served, large)
        model = ModelConfig.read(directory)
        self._spec: DecoderSpec = build_spec(model)
        self._grouping = grouping_of(model, config)
        served_groups = grouping_of(ModelConfig.read(served), config).groups
        self._blocks_per_block = _blocks_per_block(self._grouping.groups, served_groups)
        self._eos_token_ids = model.eos_token_ids
        self._max_position_embeddings = model.max_position_embeddings
        # It runs on rank 0, which reads a slice of the served model.
        read = large.files[WEIGHTS].size / config.tensor_parallel_size
        self._share = manifest.files[WEIGHTS].size / read
        dtype = resolve_dtype(config.runner.dtype, manifest.dtype)
        self._kv_dtype = resolve_kv_dtype(config.runner.kv_dtype, manifest.kv_dtype, dtype)
        self._directory = directory
        attention = choose_kernels(placement.device, config).attention

        def reopen(served: Executor) -> Executor:
            team = served.team if isinstance(served, NativeExecutor) else None
            own = replace(placement, dtype=dtype, team=team)
            return open_executor(directory, model, manifest, own, attention)

        self._reopen = reopen
        self._executor = reopen(executor)

    def bytes_beside(self, block_size: int) -> int:
        """Of its KV cache, for each block of the served model's."""
        spec, num_layers = self._spec, self._grouping.num_layers
        num_bytes = block_bytes(
            num_layers, spec.num_kv_heads, spec.head_dim, block_size, self._kv_dtype
        )
        return math.ceil(num_bytes * self._blocks_per_block)

    def start(self, limits: RuntimeLimits, device: torch.device) -> LoadedDraft:
        """With so many blocks that what runs in the served model by its `limits` fits."""
        spec, executor = self._spec, self._executor
        own = RuntimeLimits(
            math.ceil(limits.num_blocks * self._blocks_per_block),
            limits.block_size,
            min(limits.max_model_len, self._max_position_embeddings),
            spec.vocab_size,
            self._eos_token_ids,
            groups=self._grouping.groups,
        )
        heads = spec.num_kv_heads, own.block_size, spec.head_dim, self._kv_dtype
        shape = KVShape(self._grouping.num_layers, *heads, self._grouping.places)
        cache = KVCache(shape, own.num_blocks, device)
        runner = ModelRunner(executor, cache, own, device, sampler_of(executor))
        run_first_step(runner)
        return LoadedDraft(runner, self._share, self._directory, self._reopen, self._lease)


def _blocks_per_block(own: KVGroups, served: KVGroups) -> Fraction:
    """Of short texts all groups have blocks; of the longest ones those of full groups count. Where
    the served model has only windows, a draft model that has not may run out and guess less."""
    short = Fraction(own.num, served.num)
    return max(short, Fraction(own.num_full, served.num_full)) if served.num_full else short


def check_same_tokens(
    directory: Path, manifest: Manifest, served: Path, served_manifest: Manifest
) -> None:
    """Raises ConfigError unless both tokenizers give every id the same meaning."""
    if manifest.files[TOKENIZER].sha256 == served_manifest.files[TOKENIZER].sha256:
        return
    tokens, served_tokens = (_tokens(folder) for folder in (directory, served))
    if tokens == served_tokens:
        return
    ids = [i for i in {**tokens, **served_tokens} if tokens.get(i) != served_tokens.get(i)]
    first = min(ids)
    raise ConfigError(
        f"speculation.model: {directory.name} has another tokenizer than {served.name}: "
        f"{len(tokens)} tokens, not {len(served_tokens)}; id {first} is "
        f"{_shown(tokens.get(first))} there and {_shown(served_tokens.get(first))} here. A draft "
        "model must come from the same family"
    )


def _tokens(directory: Path) -> dict[int, str]:
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER))
    return {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}


def _shown(token: str | None) -> str:
    return "nothing" if token is None else json.dumps(token, ensure_ascii=False)


def proposer_of(
    config: EngineConfig, draft: LoadedDraft | None, vocab_size: int
) -> Proposer | None:
    """Who guesses for a new engine of a model with this vocabulary; None: nobody."""
    if config.speculation.method == "ngram":
        return NgramProposer(config.speculation)
    if config.speculation.method == "draft":
        assert draft is not None, "the model was loaded with another configuration"
        draft.runner.reset()  # a new engine counts sequences from the start
        return DraftModel(draft.runner, config.cache, vocab_size, draft.share)
    return None
