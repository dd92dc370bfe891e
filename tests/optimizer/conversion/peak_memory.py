"""Stages a checkpoint up to a stage and prints what memory each took at most, in bytes. No test.

Started by a test as `python -m tests.optimizer.conversion.peak_memory RECIPE WORK LAST`. Counted
are anonymous pages, and separately all resident ones: pages of a mapped file can be taken back by
the kernel at any time, but a container's limit counts them until it does.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from optimizer.pipeline import Stage, run_stages
from optimizer.progress import SilentProgress
from optimizer.recipe import load_recipe
from optimizer.stages.convert import ConvertStage
from optimizer.stages.fetch import FetchStage
from optimizer.stages.fuse import FuseStage
from optimizer.stages.pack import PackStage
from optimizer.stages.quantize import QuantizeStage
from optimizer.stages.tune import TuneStage
from optimizer.stages.verify import VerifyStage
from torchweave_ray.models.artifact import Manifest


def resident() -> tuple[int, int]:
    """Anonymous and all resident bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, whole = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return anonymous, whole


class Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.base = resident()
        self.peak = self.base

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = tuple(map(max, self.peak, resident()))  # type: ignore[assignment]


def main() -> None:
    torch.ones(64, 64).to(torch.bfloat16).float()  # what torch sets up once is no stage's
    recipe, work = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
    progress = SilentProgress()
    stages: list[Stage] = [
        FetchStage(recipe, progress),
        ConvertStage(recipe, progress),
        FuseStage(progress),
        QuantizeStage(recipe, progress),
        PackStage(recipe, progress),
        VerifyStage(recipe, progress),
        TuneStage(recipe, progress),
    ]
    last = [stage.name for stage in stages].index(sys.argv[3])
    draft = Manifest("", str(recipe.open_source().text), "", "", "", "", {})
    peaks = {}
    for stage in stages[: last + 1]:
        sampler = Sampler()
        sampler.start()
        draft, _ = run_stages([stage], work, draft, progress)
        sampler.done.set()
        sampler.join()
        peaks[stage.name] = [
            peak - base for peak, base in zip(sampler.peak, sampler.base, strict=True)
        ]
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
