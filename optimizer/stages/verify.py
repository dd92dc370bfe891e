"""Stage 6: the packed model beside its source as dequantised, in fp32: close enough, or refused.

Runs what a replica on this machine would run. The source is read layer by layer, and never whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.measuring.layerwise import LayerwiseModel, SourceTensors
from optimizer.measuring.model import MeasuredModel, all_cores, open_staged
from optimizer.measuring.quality import Quality, compare, text_windows, window_logits
from optimizer.measuring.speed import SpeedComparison, compare_speed
from optimizer.progress import Progress
from optimizer.recipe import Bars, Recipe
from optimizer.stages.fetch import open_fetched
from optimizer.store import write_atomically
from optimizer.target import why_not_measured
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.errors import ArtifactError
from torchweave_ray.hf.opening import executor_of
from torchweave_ray.models.artifact import TOKENIZER, Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.tensors import LAYOUT

RESULT = "quality.json"
SPEED = "speed.json"
_DIGITS = 6

_LOG = logging.getLogger("torchweave.optimizer")


@dataclass(frozen=True)
class VerifyStage:
    recipe: Recipe
    progress: Progress
    name: str = "verify"

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "verify": self.recipe.verify,
            "bars": dataclasses.asdict(self.recipe.bars),
            "target": self.recipe.target,
        }

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Leaves `RESULT` and `SPEED`. Raises ArtifactError with the numbers for a missed bar."""
        folder = work / self.name
        folder.mkdir(exist_ok=True)
        if self.recipe.verify == "none":
            for name in (RESULT, SPEED):
                write_atomically(folder / name, json.dumps(None))
            return manifest
        config = ModelConfig.read(work / "pack")
        windows = text_windows(work / "pack" / TOKENIZER, config.max_position_embeddings)
        tensors = SourceTensors(open_fetched(work), config, self.progress.advance)
        self.progress.expect(tensors.num_bytes)
        with all_cores() as threads:
            reference = _source_logits(config, tensors, windows)
            staged = open_staged(work / "pack", manifest, threads)
            logits = window_logits(staged, windows)
            quality = compare(reference, logits, windows, staged.executor_name)
            speed = self._speed(work, manifest, staged, config.max_position_embeddings)
        bars = self.recipe.bars
        if missed := missed_bars(quality, bars) + missed_speed(speed, bars):
            raise ArtifactError(
                f"{self.recipe.name} is not published: on {quality.num_tokens} tokens of the "
                f"bundled text, beside its source, {'; '.join(missed)}"
            )
        kv_dtype = str(staged.kv_dtype or staged.dtype).removeprefix("torch.")
        values = dataclasses.asdict(quality) | {"kv_dtype": kv_dtype}
        values = _rounded(values) | {"bars": dataclasses.asdict(bars)}
        write_atomically(folder / RESULT, json.dumps(values))
        write_atomically(folder / SPEED, json.dumps(_speed_values(speed)))
        return manifest

    def _speed(
        self, work: Path, manifest: Manifest, staged: MeasuredModel, max_length: int
    ) -> SpeedComparison | str:
        """Or why there is none."""
        if why := why_not_measured(self.recipe.target):
            _LOG.warning("[Optimizer] the speed of %s is not measured: %s", self.recipe.name, why)
            return why
        plain = replace(manifest, layout=LAYOUT, quantization={}, recipe={})
        source = open_staged(work / "fuse", plain, torch.get_num_threads(), "torch")
        return compare_speed(source, staged, max_length) or "the model's context is too short"


def _source_logits(
    config: ModelConfig, tensors: SourceTensors, windows: Sequence[Tensor]
) -> Iterator[Tensor]:
    if config.foreign is None:
        return LayerwiseModel(config, tensors, windows).logits()
    # transformers' code runs it, whole: its weights are held in fp32.
    executor = executor_of(config, dict(tensors), TorchPagedAttention())
    model = MeasuredModel(executor, executor.name, build_spec(config), torch.float32)
    return window_logits(model, windows)


def missed_bars(quality: Quality, bars: Bars) -> list[str]:
    """What to say of each bar that is missed. Numbers that are not finite miss them."""
    missed = []
    if not quality.kl <= bars.max_kl:
        missed.append(f"the KL divergence is {quality.kl:.5f}, its bar max_kl {bars.max_kl}")
    if not quality.top1 >= bars.min_top1:
        missed.append(f"top-1 agreement is {quality.top1:.4f}, its bar min_top1 {bars.min_top1}")
    if not quality.perplexity_ratio <= bars.max_perplexity_ratio:
        missed.append(
            f"perplexity is {quality.perplexity:.3f} instead of "
            f"{quality.reference_perplexity:.3f}, {quality.perplexity_ratio:.4f} times as much, "
            f"its bar max_perplexity_ratio {bars.max_perplexity_ratio}"
        )
    return missed


def missed_speed(speed: SpeedComparison | str, bars: Bars) -> list[str]:
    if bars.min_speedup is None:
        return []
    if isinstance(speed, str):
        return [f"no speed was measured ({speed}), the bar min_speedup is {bars.min_speedup}"]
    if speed.speedup >= bars.min_speedup:
        return []
    return [
        f"a lone sequence gets {speed.staged.decode_1} tokens a second instead of "
        f"{speed.source.decode_1}, {speed.speedup:.2f} times as many, its bar min_speedup "
        f"{bars.min_speedup}"
    ]


def _speed_values(speed: SpeedComparison | str) -> dict[str, Any]:
    if isinstance(speed, str):
        return {"skipped": speed}
    return dataclasses.asdict(speed) | {"speedup": round(speed.speedup, 3)}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, _DIGITS) if isinstance(v, float) else v for k, v in values.items()}
