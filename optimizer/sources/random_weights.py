"""Models that exist as a shape only: random weights, for measuring what a size costs.

Brings the tokenizer's source here and a small file that says the rest; weights are made when they
are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.sources.source import Arrivals, Fetched, Source

MODEL = "random.json"
"""{"seed": ..., "config": ...}"""
TOKENIZER_PATH = "tokenizer_path.txt"
"""Beside it: where the tokenizer's source lies on this machine."""


@dataclass(frozen=True)
class RandomSource:
    seed: int
    config: Mapping[str, Any]
    tokenizer: Source

    @property
    def text(self) -> str:
        return f"random:{self.seed}"

    def identity(self) -> list[str] | None:
        return self.tokenizer.identity()

    def fetch(self, folder: Path, arrivals: Arrivals) -> Fetched:
        fetched = self.tokenizer.fetch(folder / "tokenizer", arrivals)
        model = folder / MODEL
        values = {"seed": self.seed, "config": dict(self.config)}
        model.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        (folder / TOKENIZER_PATH).write_text(str(fetched.path))
        return Fetched(folder, (model, *fetched.files), fetched.revision)
