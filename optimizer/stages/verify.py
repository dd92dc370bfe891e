"""Stage 6: the packed model beside its source as dequantised, in fp32: close enough, or refused.

Runs what a replica on this machine would run. The source is held in memory, 4 bytes a parameter.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimizer.measuring.model import MeasuredModel, all_cores, open_staged
from optimizer.measuring.quality import Quality, compare, text_windows
from optimizer.progress import Progress
from optimizer.recipe import Bars, Recipe
from optimizer.stages.fetch import open_fetched
from optimizer.store import write_atomically
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.errors import ArtifactError
from torchweave_ray.hf.opening import executor_of
from torchweave_ray.models.artifact import TOKENIZER, Manifest
from torchweave_ray.models.config import ModelConfig, read_hf_config
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.tensors import fuse, fused_tensors

RESULT = "quality.json"
_DIGITS = 6


@dataclass(frozen=True)
class VerifyStage:
    recipe: Recipe
    progress: Progress
    name: str = "verify"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"verify": self.recipe.verify, "bars": dataclasses.asdict(self.recipe.bars)}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Leaves the numbers in `RESULT`. Raises ArtifactError with them for a missed bar."""
        folder = work / self.name
        folder.mkdir(exist_ok=True)
        if self.recipe.verify == "none":
            write_atomically(folder / RESULT, json.dumps(None))
            return manifest
        config = ModelConfig.from_hf(read_hf_config(work / "pack"))
        windows = text_windows(work / "pack" / TOKENIZER, config.max_position_embeddings)
        with all_cores() as threads:
            reference = self._reference(work, config)
            quality = compare(reference, open_staged(work / "pack", manifest, threads), windows)
        missed = missed_bars(quality, self.recipe.bars)
        if missed:
            raise ArtifactError(
                f"{self.recipe.name} is not published: on {quality.num_tokens} tokens of the "
                f"bundled text, beside its source, {'; '.join(missed)}"
            )
        values = dataclasses.asdict(quality) | {"bars": dataclasses.asdict(self.recipe.bars)}
        write_atomically(folder / RESULT, json.dumps(_rounded(values)))
        return manifest

    def _reference(self, work: Path, config: ModelConfig) -> MeasuredModel:
        """The source's own numbers, not rounded to the artifact's dtype."""
        checkpoint = open_fetched(work)
        fused = fused_tensors(config)
        self.progress.expect(4 * sum(torch.Size(tensor.shape).numel() for tensor in fused))
        tensors = {}
        for tensor in fused:
            parts = [checkpoint.load(name).float() for name in tensor.sources]
            tensors[tensor.name] = fuse(tensor, parts)
            self.progress.advance(tensors[tensor.name].nbytes)
        executor = executor_of(config, tensors, TorchPagedAttention())
        return MeasuredModel(executor, executor.name, build_spec(config), torch.float32)


def missed_bars(quality: Quality, bars: Bars) -> list[str]:
    """What to say of each bar that is missed. Numbers that are not finite miss them."""
    missed = []
    if not quality.kl <= bars.max_kl:
        missed.append(f"the KL divergence is {quality.kl:.5f}, its bar {bars.max_kl}")
    if not quality.top1 >= bars.min_top1:
        missed.append(f"top-1 agreement is {quality.top1:.4f}, its bar {bars.min_top1}")
    if not quality.perplexity_ratio <= bars.max_perplexity_ratio:
        missed.append(
            f"perplexity is {quality.perplexity:.3f} instead of "
            f"{quality.reference_perplexity:.3f}, {quality.perplexity_ratio:.4f} times as much, "
            f"its bar {bars.max_perplexity_ratio}"
        )
    return missed


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, _DIGITS) if isinstance(v, float) else v for k, v in values.items()}
