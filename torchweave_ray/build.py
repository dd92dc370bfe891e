"""The one place where the parts are wired: artifact -> executor -> KV cache -> runner -> engine.

Knows every part's constructor and none's inside. Nothing here or below imports Ray.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from torchweave_ray.config import EngineConfig
from torchweave_ray.drafting import LoadedDraft, OpenDraft, proposer_of
from torchweave_ray.engine.adapters.pool import AdapterPool
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.speculation.drafter import Drafter
from torchweave_ray.errors import ArtifactError
from torchweave_ray.hf.opening import open_executor
from torchweave_ray.kernels.machine import fingerprint
from torchweave_ray.loading.info import describe
from torchweave_ray.loading.memory import ModelMemory
from torchweave_ray.loading.opened import Alone, OpenedModel
from torchweave_ray.loading.tuning import TunedSettings, tuned_settings, tuned_threads
from torchweave_ray.models.artifact import (
    WEIGHTS,
    Lease,
    Manifest,
    hold_artifact,
    verify_artifact,
)
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement
from torchweave_ray.models.lora.folder import AdapterSource
from torchweave_ray.models.mapped_file import map_shared
from torchweave_ray.models.native_executor import NativeExecutor
from torchweave_ray.models.ops import Ops
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import Executor
from torchweave_ray.outputs import ModelInfo
from torchweave_ray.parallel.group import RankGroup
from torchweave_ray.parallel.launch import Launcher
from torchweave_ray.runner.adapters import AdapterStore, open_adapters
from torchweave_ray.runner.backends import check_invariance, choose_kernels
from torchweave_ray.runner.device import (
    gpu_fingerprint,
    resolve_device,
    resolve_dtype,
    resolve_kv_dtype,
    set_num_threads,
)
from torchweave_ray.runner.kv_spill import KVSpill, open_spill
from torchweave_ray.runner.model_runner import ModelRunner
from torchweave_ray.runner.opening import open_runner, run_first_step
from torchweave_ray.tokenizer import Tokenizer
from torchweave_ray.tokenizer.grammar import GrammarCompiler, make_vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run steps."""

    runner: ModelRunner
    info: ModelInfo
    manifest: Manifest
    tokenizer_dir: Path
    """For `load_tokenizer`."""
    tuned: TunedSettings
    """Measured by the optimizer on a machine like this one."""
    startup_s: Mapping[str, float]
    """Seconds by stage, in their order: verify, weights, kv_cache, first_step."""
    adapters: AdapterStore | None = None
    lease: Lease = field(default_factory=Lease)
    """Keeps the artifact from being deleted while its pages are mapped."""
    draft: LoadedDraft | None = None
    memory: ModelMemory | None = None
    """Lets go of weights and KV caches, and takes them again."""
    spill: KVSpill | None = None
    """Where blocks of the KV cache outlive the process."""


def load_model(
    artifact_dir: Path,
    config: EngineConfig,
    model_id: str | None = None,
    weights: NDArray[np.uint8] | None = None,
    adapters: AdapterSource | None = None,
    launcher: Launcher | None = None,
) -> LoadedModel:
    """Load an artifact; `model_id` defaults to its folder's name. `weights`: the weights file
    [bytes] where the folder has none: shared memory that others map too, and that was checked.
    `adapters`: of a `lora.source` that is no folder of this machine. `launcher`: of the processes
    for `tensor_parallel_size`; None: children of this one.

    Raises ArtifactError naming the file or tensor, ConfigError with what does not fit this machine.
    """
    stages = _Stages()
    with stages.timed("verify"):
        lease = hold_artifact(artifact_dir)
        whole = None if weights is None else map_shared(weights)
        manifest = verify_artifact(artifact_dir, elsewhere=() if whole is None else (WEIGHTS,))
        model = _checked(ModelConfig.read(artifact_dir))
    device = resolve_device(config.runner.device)
    kernels = choose_kernels(device, config)
    placement = _placement(artifact_dir, manifest, config, device, kernels.ops)
    kv_dtype = resolve_kv_dtype(config.runner.kv_dtype, manifest.kv_dtype, placement.dtype)
    found = artifact_dir, model, manifest
    source: OpenedModel
    if config.tensor_parallel_size > 1:
        source = RankGroup(
            *found, config, placement, kernels.attention, kv_dtype, launcher, whole is None
        )
    else:
        reopen = partial(open_executor, *found, placement, kernels.attention, whole)
        source = Alone(build_spec(model), reopen)
    name = model_id or artifact_dir.absolute().name
    weights_dir = artifact_dir if whole is None else None
    with ExitStack() as undo:
        undo.callback(source.close)
        loaded = _load(name, *found, config, placement, kv_dtype, source, adapters, weights_dir)
        undo.pop_all()
    return replace(loaded, startup_s={**stages.seconds, **loaded.startup_s}, lease=lease)


def _load(
    name: str,
    artifact_dir: Path,
    model: ModelConfig,
    manifest: Manifest,
    config: EngineConfig,
    placement: Placement,
    kv_dtype: torch.dtype,
    source: OpenedModel,
    adapters: AdapterSource | None,
    weights_dir: Path | None,
) -> LoadedModel:
    """`weights_dir`: with the file that a restart reads; None: there is none."""
    stages, device = _Stages(), placement.device
    with stages.timed("weights"):
        executor = source.open_executor()
        check_invariance(executor, config.runner)
        if isinstance(executor, NativeExecutor):
            # What is left for torch is small, and its threads would spin on our cores.
            set_num_threads(1)
    opened = _open_draft(artifact_dir, config, placement, executor, stages)
    with stages.timed("kv_cache"):
        store = open_adapters(config.lora, adapters, model, executor)
        beside = 0 if opened is None else opened.bytes_beside(placement.block_size)
        runner = open_runner(
            *(executor, source.spec, model, config, kv_dtype, device, store, beside),
            parts=source.runner_parts(),
        )
        draft = None if opened is None else opened.start(runner.limits, device)
    with stages.timed("first_step"):
        run_first_step(runner)
    info = describe(name, manifest, model, executor, runner, config, placement, kv_dtype)
    tuned = tuned_settings(artifact_dir, _machine(info, placement), config.scheduler)
    return LoadedModel(
        *(runner, info, manifest, artifact_dir, tuned, stages.seconds, store),
        draft=draft,
        memory=ModelMemory(
            *(runner, store, draft, source.open_executor, weights_dir, source.release)
        ),
        spill=open_spill(config.cache.spill, info, runner.kv_cache),
    )


def _spare_the_collector() -> None:
    """What was there before a process's first model, mostly torch itself, never becomes garbage:
    full collections need not look through it while steps wait."""
    if gc.get_freeze_count() == 0:
        gc.freeze()


def _placement(
    artifact_dir: Path,
    manifest: Manifest,
    config: EngineConfig,
    device: torch.device,
    ops: Ops | None,
) -> Placement:
    """Sets torch's threads, too, and spares the collector: nothing of the model is there yet."""
    _spare_the_collector()
    num_threads = set_num_threads(config.runner.threads or tuned_threads(artifact_dir))
    if config.tensor_parallel_size > 1:
        num_threads = set_num_threads(max(1, num_threads // config.tensor_parallel_size))
    return Placement(
        resolve_dtype(config.runner.dtype, manifest.dtype),
        device,
        num_threads,
        config.runner.executor,
        config.cache.block_size,
        ops=ops,
    )


def _open_draft(
    artifact_dir: Path,
    config: EngineConfig,
    placement: Placement,
    executor: Executor,
    stages: _Stages,
) -> OpenDraft | None:
    if config.speculation.model is None:
        return None
    with stages.timed("draft_weights"):
        directory = Path(config.speculation.model)
        return OpenDraft(directory, artifact_dir, config, placement, executor)


def build_engine(loaded: LoadedModel, config: EngineConfig, tokenizer: Tokenizer) -> Engine:
    scheduler = loaded.tuned.fill(config.scheduler)
    limits = loaded.runner.limits
    proposer = proposer_of(config, loaded.draft, limits.vocab_size)
    adapters = None
    if loaded.adapters is not None:
        loaded.adapters.reset()
        adapters = AdapterPool(loaded.adapters, config.lora.max_loaded)
    return Engine(
        loaded.runner,
        tokenizer,
        config.cache,
        scheduler,
        loaded.manifest.artifact_id,
        grammars=GrammarCompiler(
            lambda: make_vocabulary(tokenizer.to_json(), limits.vocab_size, limits.eos_token_ids)
        ),
        drafter=None if proposer is None else Drafter(proposer, config.speculation),
        adapters=adapters,
        memory=loaded.memory,
        store=loaded.spill,
    )


def _machine(info: ModelInfo, placement: Placement) -> Mapping[str, str | int]:
    if gpu := gpu_fingerprint(placement.device):
        return {**gpu, "executor": info.executor}
    return fingerprint(info.executor, placement.num_threads)


def _checked(model: ModelConfig) -> ModelConfig:
    for token_id in model.eos_token_ids:
        if token_id >= model.vocab_size:
            raise ArtifactError(
                f"config.json: eos_token_id {token_id} is outside the vocabulary of "
                f"{model.vocab_size}"
            )
    return model


class _Stages:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
